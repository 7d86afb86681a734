"""Token choice over depth: every token says once, as it enters, how many recursions it takes.

Mixture-of-Recursions, Bae et al. 2025 (arXiv:2507.10524, section 2.2.1). Depths are to it what experts are to a
mixture of experts, and the same rule and the same losses serve.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.depth.scorer import Scorer
from archlab.experts.balance import Balance, SwitchLoss
from archlab.experts.routers import SCORES, TopK, choices_of
from archlab.layers.alphabet import Steered
from archlab.layers.config import Config, near, require
from archlab.layers.contract import Aux, Place, Tokens


class DepthChoice(Config):
    """A router scores the depths 1 to n of each token, which takes the best. That is causal.

    score: "softmax" of the n logits, or "sigmoid" of each. hidden: of the router as an MLP with one hidden layer; None
    for linear. scale: multiplies the gates. losses: what unevenly chosen depths cost. balance_rate: a bias for the
    choice alone, moved once a step by so much towards an even load (arXiv:2408.15664); 0 for none.
    """

    looks_ahead = False  # in training it is as causal as ever

    score: str = "softmax"
    hidden: int | None = None
    scale: float = 1.0
    losses: tuple[Balance, ...] = (SwitchLoss(0.1),)
    balance_rate: float = 0.0

    def __post_init__(self):
        require(self.score in SCORES, self, "score", near(str(self.score), SCORES))
        require(self.hidden is None or self.hidden >= 1, self, "hidden", "must be at least 1, or None for linear")
        require(self.scale > 0, self, "scale", "must be positive")
        require(self.balance_rate >= 0, self, "balance_rate", "must be 0 (no such bias) or positive")

    def build(self, rngs: nnx.Rngs, at: Place, depths: int) -> "DepthChoiceModule":
        return DepthChoiceModule(self, rngs, at, depths)


class Depths(NamedTuple):
    """wanted [B, T]: how many recursions, 0 for padding. gates [B, T, n]: of each depth, for the output of the last
    recursion (`last_alone`). aux: losses; traces load [n], the share of tokens that chose each depth; updates."""

    wanted: Int[Array, "B T"]
    gates: Float[Array, "B T n"]
    aux: Aux


def last_alone(gates: Float[Array, "... n"], depth: Int[Array, "..."]) -> Float[Array, "... n"]:
    """What the output of each recursion is multiplied by: 1, but for the last of those that are taken."""
    return jnp.where(jnp.arange(1, gates.shape[-1] + 1) == depth[..., None], gates, 1)


class DepthChoiceModule(nnx.Module):
    """Weights: router, a `Scorer`; balance [n], which no gradient moves."""

    def __init__(self, config: DepthChoice, rngs: nnx.Rngs, at: Place, depths: int):
        self.config, self.rule = config, TopK(1, config.score, balance_rate=config.balance_rate)
        self.router = Scorer(rngs, at.width, depths, config.hidden)
        self.balance = Steered.zeros("->.", (depths,), config.balance_rate) if config.balance_rate else None

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens) -> Depths:
        routing = self.rule(self.router(x), None if self.balance is None else self.balance[...])
        wanted = jnp.where(tokens.real, routing.experts[:, :, 0] + 1, 0)
        counts = choices_of(routing.experts, tokens.real, routing.logits.shape[-1])
        aux = Aux({loss.name: loss.weight * loss(routing, tokens.real) for loss in self.config.losses},
                  {"load": counts / jnp.maximum(counts.sum(), 1)})
        if self.balance is not None:
            aux |= Aux(updates={"balance": counts.mean() - counts})
        return Depths(wanted, self.config.scale * routing.gates, aux)
