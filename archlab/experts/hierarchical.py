"""Two levels of routing: to a few of several groups of experts, and within each to a few of its experts (Shazeer et al.
2017, arXiv:1701.06538, appendix B)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from archlab.experts.balance import SwitchLoss
from archlab.experts.routers import Router, Routing, TopK, largest, pick
from archlab.layers.alphabet import parameter, project
from archlab.layers.config import require
from archlab.layers.contract import Place, Tokens, wide


class Hierarchical(Router):
    """Experts stand in `groups` of equal size. An expert's weight is its group's, by the convention of `outer`, times
    its own among the group's experts, by that of `inner`; a token goes to `outer.k * inner.k` experts.

    balance: weights of `SwitchLoss` over the groups, and over the experts of each group, of which the tokens that went
    to it count. They say all about the load that the balance of `MoE` would: that may be `(ZLoss(),)`.
    """

    groups: int
    outer: TopK = TopK(2, renormalise=True)
    inner: TopK = TopK(2, renormalise=True)
    balance: tuple[float, float] = (0.01, 0.01)

    def __post_init__(self):
        require(self.groups >= 1, self, "groups", "must be at least 1")
        require(self.outer.k <= self.groups, self, "outer", f"k must be at most groups = {self.groups}")
        for level in ("outer", "inner"):
            rule = getattr(self, level)
            require(not (rule.jitter or rule.bias or rule.balance_rate), self, level,
                    "jitter, bias and balance_rate are for a router of one level")
        require(len(self.balance) == 2 and min(self.balance) >= 0, self, "balance",
                "must be two weights that are not negative: over groups, and within them")

    @property
    def k(self) -> int:
        return self.outer.k * self.inner.k

    def check(self, experts: int) -> None:
        require(experts % self.groups == 0, self, "groups", f"must divide the number of experts, {experts}")
        self.outer.check(self.groups)
        require(self.inner.k <= experts // self.groups, self, "inner",
                f"k = {self.inner.k}: each of {self.groups} groups has {experts // self.groups} experts")
        self.inner.check(experts // self.groups)

    def __call__(self, groups: Float[Array, "B T groups"], logits: Float[Array, "B T E"]) -> tuple[Routing, ...]:
        """The rule. Returns what was decided in all; among groups; and within each, [B, T, groups, ...]."""
        outer = self.outer(groups)
        B, T, G = groups.shape
        inner = self.inner(logits.reshape(B, T * G, -1))  # to the rule, each group of a token is a token
        inner = jax.tree.map(lambda a: a.reshape(B, T, G, -1), inner)
        chosen = jnp.take_along_axis(inner.experts, outer.experts[..., None], -2)  # [B, T, outer.k, inner.k]
        experts = (outer.experts[..., None] * inner.logits.shape[-1] + chosen).reshape(B, T, self.k)
        gates = (_weights(outer)[..., None] * _weights(inner)).reshape(logits.shape)
        _, order = largest(pick(gates, experts), self.k)
        experts = jnp.take_along_axis(experts, order, -1)
        probs = (outer.probs[..., None] * inner.probs).reshape(logits.shape)
        joint = (outer.logits[..., None] + inner.logits).reshape(logits.shape)
        return Routing(experts, pick(gates, experts), gates, probs, joint), outer, inner

    def build(self, rngs, at, experts, scale):
        return HierarchicalModule(self, rngs, at, experts, scale)


class HierarchicalModule(nnx.Module):
    """Weights: groups [D, groups], weight [D, E]. Losses: group_balance, balance_within."""

    def __init__(self, config: Hierarchical, rngs: nnx.Rngs, at: Place, experts: int, scale: float):
        self.config = config
        self.groups = parameter(rngs, "D->.", (at.width, config.groups), scale=scale)
        self.weight = parameter(rngs, "D->E", (at.width, experts), scale=scale)

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens) -> Routing:
        x = wide(x)
        groups, logits = project(x, self.groups, "BTD,DE->BTE"), project(x, self.weight, "BTD,DE->BTE")
        routing, outer, inner = self.config(groups, logits)
        over, within = self.config.balance
        routing.aux.losses["group_balance"] = over * SwitchLoss()(outer, tokens.real)
        routing.aux.losses["balance_within"] = within * balance_within(outer, inner, tokens.real)
        return routing


def balance_within(outer: Routing, inner: Routing, real: Bool[Array, "B T"]) -> Float[Array, ""]:
    """The mean over groups of each one's `SwitchLoss`, over the tokens that went to it."""
    G = outer.logits.shape[-1]
    went = (outer.experts[..., None] == jnp.arange(G)).any(-2) & real[..., None]
    rows = lambda a: jnp.moveaxis(a, 2, 0).reshape(G, -1, *a.shape[3:])  # a group is a row of tokens
    return SwitchLoss(per="sequence")(jax.tree.map(rows, inner), rows(went))


def _weights(level: Routing) -> jax.Array:
    """The weight that each choice of a level has, or would have beside those chosen. What a convention multiplies its
    gates by is the same for all of a token's choices."""
    factor = level.weights[..., :1] / (pick(level.gates, level.experts)[..., :1] + 1e-20)
    return level.gates * factor
