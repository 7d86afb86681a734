"""The second expert by chance: GShard's router (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1); GLaM's too."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from archlab.experts.routers import LinearModule, Router, Routing, TopK, largest, pick, router_key
from archlab.layers.alphabet import project
from archlab.layers.config import require
from archlab.layers.contract import Tokens, wide


class SecondByChance(Router):
    """The two best experts, with weights g1 / (g1 + g2) and g2 / (g1 + g2); in the training form the second is only
    kept with probability `min(1, weight / threshold)`, the first's weight staying what it is.

    GShard itself is `MoE(experts, hidden, SecondByChance(), Capacity(factor, order="choice"),
    balance=(SwitchLoss(first=1),))`. Without training both are kept.

    threshold: from which weight on the second is certain (GShard 0.5, Tensor2Tensor 0.2).
    """

    threshold: float = 0.5
    k = 2

    def __post_init__(self):
        require(self.threshold > 0, self, "threshold", "must be positive")

    def weigh(self, gates, experts):
        return pick(gates, experts) / largest(gates, 2)[0].sum(-1, keepdims=True)

    def __call__(self, logits: Float[Array, "B T E"], key: jax.Array | None = None) -> Routing:
        """The rule. key: draws who keeps a second expert; None keeps all."""
        both = TopK(2, renormalise=True)(logits)
        if key is None:
            return both
        first, second = both.experts[..., 0], both.experts[..., 1]
        drawn = jax.random.uniform(key, second.shape, both.weights.dtype)
        kept = both.weights[..., 1] > self.threshold * drawn
        experts = jnp.stack([first, jnp.where(kept, second, logits.shape[-1])], -1)
        return Routing(experts, self.weigh(both.gates, experts), both.gates, both.probs, both.logits)

    def build(self, rngs, at, experts, scale):
        return SecondByChanceModule(self, rngs, at, experts, scale)


class SecondByChanceModule(LinearModule):
    """Weight: weight [D, E]."""

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens) -> Routing:
        logits = project(wide(x), self.weight, "BTD,DE->BTE")
        return self.config(logits, None if tokens.training is None else router_key(tokens))
