"""A module taken apart into plain dictionaries, and put together again.

`jax.jit` over dictionaries of arrays is what training, sharding and checkpoints are written in: keys are attribute
paths such as "body/unit/layers/0/layer/query", the same that `Aux` uses.
"""

import jax
from flax import nnx


def split(module: nnx.Module) -> tuple[nnx.GraphDef, dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns structure, parameters {path: array}, and all other variables (moved by `Aux.updates`) {path: array}."""
    structure, parameters, rest = nnx.split(module, nnx.Param, ...)
    flat = lambda state: {"/".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(state)}
    return structure, flat(parameters), flat(rest)


def merge(structure: nnx.GraphDef, *parts: dict[str, jax.Array]) -> nnx.Module:
    """The module again, from the structure and dictionaries that together hold all its variables."""
    nested: dict = {}
    for part in parts:
        for path, value in part.items():
            *parents, name = [int(p) if p.isdigit() else p for p in path.split("/")]
            node = nested
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = value
    return nnx.merge(structure, nested)
