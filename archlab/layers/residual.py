"""The residual block: `x + layer(norm(x))` and its relatives."""

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Layer, Place, Tokens
from archlab.layers.norms import RMSNorm


class Residual(LayerConfig):
    """`outer(x + scale * dropout(after(layer(before(x)))))`; each norm may be None.

    Pre-norm: `before` (the default). Post-norm (Vaswani et al. 2017): before=None, outer=LayerNorm(). Sandwich
    (CogView, arXiv:2105.13290; Gemma 2): before and after. dropout: the share of the branch's channels dropped in the
    training form. rate: the learning rate of all parameters of the branch, as a multiple of their own. spread: among
    how many branches initialisers divide what is added to the stream; None for all. (training/transfer.py sets these.)
    """

    layer: LayerConfig
    before: LayerConfig | None = RMSNorm()
    after: LayerConfig | None = None
    outer: LayerConfig | None = None
    scale: float = 1.0
    dropout: float = 0.0
    rate: float = 1.0
    spread: int | None = None

    def __post_init__(self):
        require(0 <= self.dropout < 1, self, "dropout", "must lie in [0, 1)")
        require(self.rate >= 0, self, "rate", "must be 0 or more")
        require(self.spread is None or self.spread >= 1, self, "spread", "must be at least 1, or None for all branches")

    @property
    def branches(self) -> int:
        return 1

    def build(self, rngs: nnx.Rngs, at: Place) -> "ResidualModule":
        return ResidualModule(self, rngs, at)


class ResidualModule(Layer):
    def __init__(self, config: Residual, rngs: nnx.Rngs, at: Place):
        at = at if config.spread is None else at._replace(spread=config.spread)
        norm = lambda c: None if c is None else c.build(rngs, at)
        self.before, self.after, self.outer = norm(config.before), norm(config.after), norm(config.outer)
        self.layer = config.layer.build(rngs, at)
        self.scale, self.dropout = config.scale, config.dropout
        for weight in parameters_of(self).values() if config.rate != 1 else ():
            weight.set_metadata(rate=config.rate * weight.rate)

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return self.layer.init_state(batch, max_length, dtype, memory)

    def __call__(self, x, tokens: Tokens, state=None):
        said = self.layer(x if self.before is None else self.before(x), tokens, state)
        if not (isinstance(said, tuple) and len(said) == 3):
            raise ValueError(f"{type(self.layer).__name__} must return y, state, aux")
        y, state, aux = said
        if y.shape != x.shape:
            raise ValueError(f"{type(self.layer).__name__} returned {y.shape}; it must be {x.shape}, as its input")
        if self.after is not None:
            y = self.after(y)
        if tokens.training is not None and self.dropout:
            keep = jax.random.bernoulli(tokens.training.key, 1 - self.dropout, y.shape)
            y = jnp.where(keep, y / (1 - self.dropout), 0)
        x = x + (y if self.scale == 1 else self.scale * y)
        if self.outer is not None:
            x = self.outer(x)
        return x, state, aux.under("layer")
