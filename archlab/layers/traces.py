"""Traces by layer: what `Repeat` and `Recur` have stacked, apart again and in order."""

from collections.abc import Mapping

import numpy as np


def per_layer(traces: Mapping[str, np.ndarray], name: str, ndim: int) -> dict[str, np.ndarray]:
    """The trace called `name` of every layer that has one, in the order of the network.

    Args: traces: as in `Aux`, from any device; ndim: of one layer's trace, before copies were stacked.
    Returns: {path of the layer: its trace}. Paths are those of a model taken apart by `unstack`: the copies of
      "body/unit/layers/1/layer" are "body/unit/0/layers/1/layer", "body/unit/1/layers/1/layer", ...
    """
    found = {}
    for key, value in traces.items():
        *path, last = key.split("/")
        if last != name:
            continue
        value = np.asarray(value)
        stacked = [i + 1 for i, part in enumerate(path) if part == "unit" and not "".join(path[i + 1:i + 2]).isdigit()]
        for copy in np.ndindex(value.shape[:value.ndim - ndim]):
            parts = list(path)
            for place, number in reversed(list(zip(stacked + [len(path)] * len(copy), copy))):
                parts.insert(place, str(number))
            found["/".join(parts)] = value[copy]
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(path: str) -> tuple:
    """What an encoder's layers come first by, and the tenth after the second."""
    parts = path.split("/")
    return parts[0] != "encoder", [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
