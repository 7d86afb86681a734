"""Routers: which experts a token goes to, and with what weights.

A router's rule is a pure function of logits (and of a bias, where one balances the load); its module holds the weights
that make logits of tokens. The published conventions of token choice are expressions of `TopK`:

    Switch (arXiv:2101.03961)             TopK(1, jitter=0.01)                          weight p_i
    Mixtral (arXiv:2401.04088), gpt-oss   TopK(2, renormalise=True)                     softmax over the chosen logits
    OLMoE (arXiv:2409.02060), Jamba       TopK(8)                                       p_i: they sum to less than 1
    Llama 4                               TopK(1, score="sigmoid")                      scales the expert's input
    DeepSeek-V2 (arXiv:2405.04434)        TopK(6, groups=Groups(8, keep=3), scale=16)
    DeepSeek-V3 (arXiv:2412.19437)        TopK(8, "sigmoid", True, 2.5, Groups(8, keep=4, best=2), balance_rate=0.001)

Other rules have files of their own: noisy, gshard, sampled, expert_choice, hierarchical, mixture_of_routers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.layers.alphabet import Steered, parameter, project
from archlab.layers.config import Config, near, require
from archlab.layers.contract import Aux, Place, Tokens, pytree, wide
from archlab.layers.sharding import per_shard

SCORES = {"softmax": lambda logits: jax.nn.softmax(logits, axis=-1), "sigmoid": jax.nn.sigmoid}


@pytree
class Routing:
    """What a router decided, E standing for "nobody".

    experts [B, T, k]: the chosen, best first. weights [B, T, k]: of their outputs. gates [B, T, E]: what the weight of
    each expert would be made of. probs [B, T, E]: sum to 1; the balance of these and of the choices is judged.
    logits [B, T, E]. chances [B, T, E]: how likely each expert was to be chosen, where there is noise (`NoisyTopK`).
    room: what an expert takes of a row at most, where the router itself bounds it (`ExpertChoice`). aux: what the
    router itself has to say.
    """

    experts: Int[Array, "B T k"]
    weights: Float[Array, "B T k"]
    gates: Float[Array, "B T E"]
    probs: Float[Array, "B T E"]
    logits: Float[Array, "B T E"]
    chances: Float[Array, "B T E"] | None = None
    room: int | None = dataclasses.field(default=None, metadata={"static": True})
    aux: Aux = dataclasses.field(default_factory=Aux)


class Router(Config):
    """Base of all routers. A subclass says `k`, the most experts that a token goes to, and builds its module, which
    gives a `Routing` for a stream [B, T, D] and its tokens; `weigh` must give the same weights. It keeps no
    state: what it decides about a token must not depend on others (without training).

    noisy: whether the `Routing` knows `chances`. looks_ahead: whether in the training form experts choose among all
    tokens of a row, up to a `room`.
    """

    noisy = False
    looks_ahead = False

    def build(self, rngs: nnx.Rngs, at: Place, experts: int, scale: float) -> nnx.Module:
        """The module. scale: multiplies the default standard deviation of its weights."""
        raise TypeError(f"{type(self).__name__} does not say how it is built")

    def check(self, experts: int) -> None:
        """Raises ValueError where it cannot choose among so many experts."""
        require(self.k <= experts, self, "k", f"must be at most the number of experts, {experts}")

    def used(self, experts: int) -> float:
        """How many experts a token goes to on average, for the accounts."""
        return self.k

    def weigh(self, gates: Float[Array, "B T E"], experts: Int[Array, "B T k"]) -> Float[Array, "B T k"]:
        """The weights of some experts' outputs; 0 for nobody's."""
        return pick(gates, experts)


class Groups(Config):
    """Node-limited routing (DeepSeek-V2, section 2.1.3): the experts stand in `count` groups, and a token goes to the
    `keep` best only. A group is as good as the sum of its `best` best experts."""

    count: int
    keep: int
    best: int = 1

    def __post_init__(self):
        require(self.count >= 1, self, "count", "must be at least 1")
        require(1 <= self.keep <= self.count, self, "keep", f"must lie between 1 and count = {self.count}")
        require(self.best >= 1, self, "best", "must be at least 1")

    def limit(self, scores: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The scores, -inf outside the groups kept."""
        grouped = scores.reshape(*scores.shape[:-1], self.count, -1)
        _, kept = jax.lax.top_k(jax.lax.top_k(grouped, self.best)[0].sum(-1), self.keep)
        inside = (kept[..., None] == jnp.arange(self.count)).any(-2)
        return jnp.where(inside[..., None], grouped, -jnp.inf).reshape(scores.shape)


class TopK(Router):
    """Every token goes to the `k` experts with the highest scores.

    score: "softmax" of the logits, or "sigmoid" of each. renormalise: scale the k weights to sum to 1; with softmax
    this is the softmax over the chosen logits. scale: multiplies the weights. groups: limits the choice. jitter: in the
    training form the router's input, and only that, is multiplied by U(1 - jitter, 1 + jitter). bias: of the logits,
    learned. balance_rate: a bias for the choice alone, which is moved once a step by so much towards an even load
    (Wang et al. 2024, arXiv:2408.15664: 0.001); 0 for none.
    """

    k: int
    score: str = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    groups: Groups | None = None
    jitter: float = 0.0
    bias: bool = False
    balance_rate: float = 0.0

    def __post_init__(self):
        require(self.k >= 1, self, "k", "must be at least 1")
        require(self.score in SCORES, self, "score", near(str(self.score), SCORES))
        require(self.k > 1 or not self.renormalise, self, "renormalise",
                "one weight scaled to 1 teaches the router nothing: k = 1 wants False")
        require(self.scale > 0, self, "scale", "must be positive")
        require(0 <= self.jitter < 1, self, "jitter", "must lie in [0, 1)")
        require(self.balance_rate >= 0, self, "balance_rate", "must be 0 (no such bias) or positive")

    def check(self, experts: int) -> None:
        super().check(experts)
        if self.groups is None:
            return
        count, keep, best = self.groups.count, self.groups.keep, self.groups.best
        require(experts % count == 0, self, "groups", f"count = {count} must divide the number of experts, {experts}")
        require(best <= experts // count, self, "groups", f"best = {best}: a group has {experts // count} experts")
        require(self.k <= keep * (experts // count), self, "groups",
                f"k = {self.k} experts do not stand in keep = {keep} groups of {experts // count}")

    def __call__(self, logits: Float[Array, "B T E"], balance: Float[Array, "E"] | None = None) -> Routing:
        """The rule. balance: added to the scores for the choice, not in the weights."""
        logits = wide(logits)
        gates = SCORES[self.score](logits)
        merit = logits if balance is None and self.groups is None else gates
        if balance is not None:
            merit = merit + jax.lax.stop_gradient(balance)
        # per shard: left to the compiler, a sort gathers all rows of the batch on every device
        experts = per_shard(self._best, "BT.", "BT.")(merit)
        probs = gates if self.score == "softmax" else gates / (gates.sum(-1, keepdims=True) + 1e-20)
        return Routing(experts, self.weigh(gates, experts), gates, probs, logits)

    def _best(self, merit):
        return jax.lax.top_k(merit if self.groups is None else self.groups.limit(merit), self.k)[1]

    def weigh(self, gates, experts):
        weights = pick(gates, experts)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return weights * self.scale

    def build(self, rngs, at, experts, scale):
        return TopKModule(self, rngs, at, experts, scale)


class LinearModule(nnx.Module):
    """Base of the modules whose logits are one product. Weight: weight [D, E]."""

    def __init__(self, config: Router, rngs: nnx.Rngs, at: Place, experts: int, scale: float):
        self.config = config
        self.weight = parameter(rngs, "D->E", (at.width, experts), scale=scale)


class TopKModule(LinearModule):
    """Weights: weight [D, E], bias [E]; balance [E], which no gradient moves."""

    def __init__(self, config: TopK, rngs: nnx.Rngs, at: Place, experts: int, scale: float):
        super().__init__(config, rngs, at, experts, scale)
        self.bias = parameter(rngs, "->E", (experts,)) if config.bias else None
        self.balance = Steered.zeros("->E", (experts,), config.balance_rate) if config.balance_rate else None

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens) -> Routing:
        logits = project(jittered(x, tokens, self.config.jitter), self.weight, "BTD,DE->BTE")
        if self.bias is not None:
            logits = logits + self.bias[...].astype(logits.dtype)
        if self.balance is None:
            return self.config(logits)
        routing = self.config(logits, self.balance[...])
        counts = choices_of(routing.experts, tokens.real, logits.shape[-1])
        return dataclasses.replace(routing, aux=Aux(updates={"balance": counts.mean() - counts}))


def jittered(x: Float[Array, "B T D"], tokens: Tokens, jitter: float) -> Float[Array, "B T D"]:
    """What a router reads: `x` in at least float32, without which training diverges (Switch, section 2.4), and noisy
    in the training form where `jitter` says so."""
    x = wide(x)
    if tokens.training is None or not jitter:
        return x
    return x * jax.random.uniform(router_key(tokens), x.shape, x.dtype, 1 - jitter, 1 + jitter)


def router_key(tokens: Tokens) -> jax.Array:
    """A router's random key: the layer's own is the enclosing block's too, for its dropout."""
    return jax.random.fold_in(tokens.training.key, 1)


def pick(values: Float[Array, "B T E"], experts: Int[Array, "B T k"]) -> Float[Array, "B T k"]:
    """Each token's values at its experts; 0 for nobody's."""
    E = values.shape[-1]
    return jnp.where(experts < E, jnp.take_along_axis(values, jnp.minimum(experts, E - 1), axis=-1), 0)


def largest(values: Float[Array, "B T N"], k: int) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"]]:
    """The `k` largest along the last axis, and where they stand. Every device sorts its own rows: left to the compiler,
    a sort gathers all rows of the batch on every device."""
    return per_shard(lambda values: tuple(jax.lax.top_k(values, k)), "BT.", "BT. BT.")(values)


def choices_of(experts: Int[Array, "B T k"], real, count: int) -> Int[Array, "E"]:
    """How many choices of real tokens fell on each expert."""
    hits = (experts[..., None] == jnp.arange(count)) & real[..., None, None]
    return hits.sum((0, 1, 2))
