"""Adaptive computation time: every token decides after how many steps its output is done.

Graves 2016 (arXiv:1603.08983), section 2; in the form of the Universal Transformer (Dehghani et al. 2018,
arXiv:1807.03819, section 2.2 and appendix C).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import Config, near, require
from archlab.layers.contract import Aux, Place, Tokens, pytree, wide


MIXTURES = ("running", "accumulated")


class ACT(Config):
    """Halting by a probability `p = sigmoid(w . h + b)`, taken from the state h before each step.

    A token halts at the step where its sum of p would exceed 1 - epsilon. The steps' outputs f(h) are mixed with shares
    u, which are p for a token that goes on, what was left of 1 (the remainder) at its last step, and 0 afterwards.

    epsilon: in (0, 1). bias: b at the start; 1.0 begins with about two steps. ponder: the weight of the loss
    `mean(steps + remainder)` over real tokens, which makes thinking cost something. mixture: "running", the Universal
    Transformer's interpolation `s <- u f(h) + (1 - u) s` from s = 0, or "accumulated", Graves' mean `s <- s + u f(h)`.
    """

    epsilon: float = 0.01
    bias: float = 1.0
    ponder: float = 0.01
    mixture: str = "running"

    def __post_init__(self):
        require(self.mixture in MIXTURES, self, "mixture", near(self.mixture, MIXTURES))
        require(0 < self.epsilon < 1, self, "epsilon", "must lie between 0 and 1 (0.01: halt at a sum of 0.99)")
        require(self.ponder >= 0, self, "ponder", "must be 0 (none) or positive")

    def build(self, rngs: nnx.Rngs, at: Place) -> "ACTModule":
        return ACTModule(self, rngs, at)


@pytree
class Halting:
    """total [B, T]: the sum of p while running; remainder [B, T]: 1 - total of a token that has halted, else 0;
    steps [B, T]: updates so far; running [B, T]; output [B, T, D]: the mixture s."""

    total: Float[Array, "B T"]
    remainder: Float[Array, "B T"]
    steps: Int[Array, "B T"]
    running: Bool[Array, "B T"]
    output: Float[Array, "B T D"]


class ACTModule(nnx.Module):
    """Weights: halt [D, 1], bias [1]."""

    def __init__(self, config: ACT, rngs: nnx.Rngs, at: Place):
        self.config = config
        self.halt = parameter(rngs, "D->.", (at.width, 1))
        self.bias = parameter(rngs, "->.", (1,), nnx.initializers.constant(config.bias))

    def start(self, x: Float[Array, "B T D"], tokens: Tokens) -> Halting:
        """Before the first step: all real tokens run."""
        nothing = jnp.zeros(x.shape[:2], wide(x).dtype)
        return Halting(nothing, nothing, jnp.zeros(x.shape[:2], jnp.int32), tokens.real, jnp.zeros_like(x))

    def update(self, now: Halting, before: Float[Array, "B T D"], after: Float[Array, "B T D"]) -> Halting:
        """After a step that made `after` of `before`."""
        p = jax.nn.sigmoid(project(wide(before), self.halt, "BTD,DN->BTN")[:, :, 0] + self.bias[...])
        goes_on = now.running & (now.total + p <= 1 - self.config.epsilon)
        halts = now.running & ~goes_on
        remainder = jnp.where(halts, 1 - now.total, now.remainder)
        share = jnp.where(goes_on, p, jnp.where(halts, remainder, 0))
        mix = share[:, :, None].astype(after.dtype)
        kept = 1 - mix if self.config.mixture == "running" else 1
        return Halting(now.total + jnp.where(goes_on, p, 0), remainder, now.steps + now.running, goes_on,
                       mix * after + kept * now.output)

    def said(self, end: Halting, tokens: Tokens) -> Aux:
        """The ponder loss; traces steps [B, T] and ponder, the mean of steps + remainder over real tokens.

        A token cut off by the last step has no remainder, as in the published code.
        """
        ponder = jnp.where(tokens.real, end.steps + end.remainder, 0).sum() / jnp.maximum(tokens.real.sum(), 1)
        return Aux({"ponder": self.config.ponder * ponder}, {"steps": end.steps, "ponder": ponder})
