"""How large the numbers are that flow through a model: the stream, what each branch adds to it, the logits.

The coordinate check (Yang et al. 2022, Tensor Programs V, arXiv:2203.03466, appendix D.1): train a few steps at several
widths and look at the sizes. Where one grows or vanishes with the width, the parametrisation is wrong there.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Int

from archlab.layers.contract import Layer, Tokens
from archlab.layers.repeat import RepeatModule
from archlab.layers.residual import ResidualModule
from archlab.layers.sequence import SequenceModule
from archlab.model import Model


def stations(model: Model, ids: Int[Array, "B T"]) -> dict[str, jax.Array]:
    """What flows: "embedding" and "stream" (behind the last block) [B, T, D], "branch 0", "branch 1", ...: what each
    residual branch added, those inside of other layers left out, [B, T, D]; and "logits" [B, T, V]."""
    x, tokens, _, _ = model.enter(ids)
    found = {"embedding": x}
    x, _ = _through(model.body, x, tokens, found)
    return found | {"stream": x, "logits": model.logits(x if model.norm is None else model.norm(x))}


def _through(layer: Layer, x: jax.Array, tokens: Tokens, found: dict[str, jax.Array]):
    """What `layer` makes of `x`, and what it publishes; notes branches in `found`."""
    if isinstance(layer, (RepeatModule, SequenceModule)):
        for child in layer.units() if isinstance(layer, RepeatModule) else layer.layers:
            x, provides = _through(child, x, tokens, found)
            tokens = tokens.provide(provides)
        return x, {}
    y, _, aux = layer(x, tokens)
    if isinstance(layer, ResidualModule):
        found[f"branch {len(found) - 1}"] = y - x
    return y, aux.provides


def sizes(before: Mapping[str, jax.Array], after: Mapping[str, jax.Array]) -> dict[str, tuple[float, float]]:
    """Of two `stations` of one text: {name: (root mean square after, root mean square of the change)}, for "embedding",
    "stream", "logits" and "branches", the mean over these."""
    size = lambda a: float(np.sqrt(np.mean(np.square(np.asarray(a, np.float64)))))
    found = {name: (size(now), size(np.asarray(now) - np.asarray(before[name]))) for name, now in after.items()}
    branches = [found.pop(name) for name in list(found) if name.startswith("branch ")]
    return found | {"branches": tuple(np.mean(branches, axis=0).tolist())} if branches else found
