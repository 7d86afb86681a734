"""What a router over depth makes of a token: a few numbers, by one matrix or by a small MLP."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from archlab.layers.alphabet import parameter, project
from archlab.layers.contract import wide


class Scorer(nnx.Module):
    """`out . x`, or `out . gelu(up . x)` with one hidden layer; computed in at least float32, since choices hang on it.

    Weights: out [D, N] or [F, N]; up [D, F].
    """

    def __init__(self, rngs: nnx.Rngs, width: int, scores: int, hidden: int | None = None):
        self.up = None if hidden is None else parameter(rngs, "D->F", (width, hidden))
        self.out = parameter(rngs, "D->." if hidden is None else "F->.", (hidden or width, scores))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N"]:
        x = wide(x)
        if self.up is not None:
            x = jax.nn.gelu(project(x, self.up, "BTD,DF->BTF"))
        return project(x, self.out, "BTD,DN->BTN")
