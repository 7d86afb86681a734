"""Input re-injection: every loop sees again what the loops began with.

Looped transformers: Yang et al. 2023 (arXiv:2311.12424), by addition; Huginn: Geiping et al. 2025 (arXiv:2502.05171),
section 3.2, by an adapter.
"""

import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, near, require
from archlab.layers.contract import Aux, Layer, Place, Tokens

WAYS = ("add", "concat")


class Inject(LayerConfig):
    """Brings into the stream what `Provide(name, layer)` published before the recursion.

    how: "add" gives `x + input`, "concat" `[x, input] W`.
    """

    name: str
    how: str = "add"

    def __post_init__(self):
        require(self.how in WAYS, self, "how", near(self.how, WAYS))

    def build(self, rngs: nnx.Rngs, at: Place) -> "InjectModule":
        return InjectModule(self, rngs, at)


class InjectModule(Layer):
    """Weight: mix [2D, D], for "concat" alone."""

    def __init__(self, config: Inject, rngs: nnx.Rngs, at: Place):
        self.config = config
        self.mix = parameter(rngs, "D->.", (2 * at.width, at.width)) if config.how == "concat" else None

    def __call__(self, x, tokens: Tokens, state=None):
        if self.config.name not in tokens.provided:
            there = near(self.config.name, sorted(tokens.provided)) if tokens.provided else "nothing is published here"
            raise ValueError(f'Inject.name = {self.config.name!r}: {there}; Provide("{self.config.name}", Identity()) '
                             "before the recursion, in one Sequence with it, publishes what flows past")
        given = tokens.provided[self.config.name].astype(x.dtype)
        y = x + given if self.mix is None else project(jnp.concatenate([x, given], -1), self.mix, "BTC,CD->BTD")
        return y, None, Aux()
