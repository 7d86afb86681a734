"""QK-norm: queries and keys of a bounded size, so that scores cannot grow without end (arXiv:2302.05442).

The published forms differ in what is normalised together and in whose gains: Qwen 3 and Gemma 3 norm each head and
share one gain; StableLM and Cohere give every head its own; OLMo 2 norms all heads as one vector; Llama 4 norms after
the rotation, without gains.
"""

import flax.nnx as nnx
from jaxtyping import Array, Float

from archlab.layers.config import Config, near, require
from archlab.layers.norms import Norm, NormModule, RMSNorm

OVER = ("head", "all")


class QKNorm(Config):
    """norm: which. over: "head" (each head's K channels) or "all" (the H K of all heads together). per_head: every head
    has gains of its own ("all" implies it). after: after the rotation rather than before."""

    norm: Norm = RMSNorm()
    over: str = "head"
    per_head: bool = False
    after: bool = False

    def __post_init__(self):
        require(isinstance(self.norm, Norm), self, "norm", "must be a norm such as RMSNorm()")
        require(self.over in OVER, self, "over", near(str(self.over), OVER))


class QKNormModule(NormModule):
    """Weights: scale and bias [K], or [H, K] where heads have their own; keys say G for H."""

    def __init__(self, config: QKNorm, rngs: nnx.Rngs, heads: int, size: int, letter: str):
        own = config.per_head or config.over == "all"
        super().__init__(config.norm, rngs, (heads, size) if own else (size,), f"->{letter}K" if own else "->K")
        self.all = config.over == "all"

    def __call__(self, x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
        together = x.reshape(*x.shape[:2], -1) if self.all else x
        return self.affine(self.norm.normalise(together).reshape(x.shape))
