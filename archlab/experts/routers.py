"""Token-choice routing: which experts a token goes to, with what weights, and what an unbalanced choice costs.

Everything here is a pure function of the router's logits, in at least float32. The published conventions differ in
two respects only, whether the softmax is taken before or after the k best are chosen, and whether the k weights are
scaled to sum to 1:

    Switch (arXiv:2101.03961)             TopK(1)                     weight p_i
    GShard's gate (arXiv:2006.16668)      TopK(2, renormalise=True)   p_i / (p_1 + p_2)
    Mixtral (arXiv:2401.04088), Granite   TopK(2, softmax="after")    softmax over the chosen logits: the same numbers
    Jamba (arXiv:2403.19887), OLMoE       TopK(2)                     p_i: they sum to less than 1
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from archlab.layers.config import Config, near, require
from archlab.layers.contract import pytree, wide


@pytree
class Routing:
    """experts: the chosen, best first. weights: of their outputs. probs: softmax over all experts."""

    experts: Int[Array, "B T k"]
    weights: Float[Array, "B T k"]
    probs: Float[Array, "B T E"]


class TopK(Config):
    """Every token goes to the `k` experts with the highest logits.

    softmax: "before" the choice, over all experts, or "after" it, over the chosen. renormalise: scale the weights of
    the softmax before the choice to sum to 1.
    """

    k: int
    softmax: str = "before"
    renormalise: bool = False

    def __post_init__(self):
        require(self.k >= 1, self, "k", "must be at least 1")
        require(self.softmax in ("before", "after"), self, "softmax", near(str(self.softmax), ("before", "after")))
        require(not (self.renormalise and self.softmax == "after"), self, "renormalise",
                'a softmax "after" the choice sums to 1 already')
        require(self.k > 1 or not (self.renormalise or self.softmax == "after"), self, "k",
                'one weight scaled to 1 teaches the router nothing: k = 1 wants softmax="before", renormalise=False')

    def __call__(self, logits: Float[Array, "B T E"]) -> Routing:
        logits = wide(logits)
        probs = jax.nn.softmax(logits, axis=-1)
        chosen, experts = jax.lax.top_k(logits, self.k)
        if self.softmax == "after":
            return Routing(experts, jax.nn.softmax(chosen, axis=-1), probs)
        weights = jnp.take_along_axis(probs, experts, axis=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return Routing(experts, weights, probs)


def expert_load(routing: Routing, real: Bool[Array, "B T"]) -> Float[Array, "E"]:
    """The share of all choices of real tokens that fell on each expert; sums to 1."""
    E, k = routing.probs.shape[-1], routing.experts.shape[-1]
    hits = (routing.experts[..., None] == jnp.arange(E)) & real[..., None, None]
    return hits.sum((0, 1, 2)).astype(routing.probs.dtype) / (k * _count(real))


def balance_loss(routing: Routing, real: Bool[Array, "B T"]) -> jax.Array:
    """Switch Transformer's load-balancing loss (section 2.2), over all real tokens of the batch: `E * sum_i f_i P_i`.

    f_i is expert i's share of the choices and P_i its mean probability. All k choices count, and f sums to 1 (some
    codes let it sum to k): uniform routing gives 1 whatever k is, and all on one expert gives E for k = 1.
    """
    mean = jnp.where(real[..., None], routing.probs, 0).sum((0, 1)) / _count(real)
    return routing.probs.shape[-1] * jnp.sum(expert_load(routing, real) * mean)


def z_loss(logits: Float[Array, "B T E"], real: Bool[Array, "B T"]) -> jax.Array:
    """ST-MoE's router z-loss (arXiv:2202.08906, equation 5): the mean over real tokens of logsumexp(logits)^2."""
    return jnp.where(real, jax.nn.logsumexp(wide(logits), axis=-1) ** 2, 0).sum() / _count(real)


def routing_traces(routing: Routing, real: Bool[Array, "B T"]) -> dict[str, jax.Array]:
    """What to look at, over the real tokens of the batch.

    load [E]: share of the choices. max_violation: max(load) / mean(load) - 1, 0 for perfect balance
    (arXiv:2408.15664). entropy: mean entropy in nats of a token's probabilities, low for a decided router;
    mean_entropy: entropy of their mean, log E for a balanced one. choices [B, T, k]: the experts, -1 at padding.
    """
    load = expert_load(routing, real)
    entropy = lambda p: -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1)
    mean = jnp.where(real[..., None], routing.probs, 0).sum((0, 1)) / _count(real)
    return {"load": load, "max_violation": load.max() * load.size - 1,
            "entropy": jnp.where(real, entropy(routing.probs), 0).sum() / _count(real), "mean_entropy": entropy(mean),
            "choices": jnp.where(real[..., None], routing.experts, -1)}


def _count(real: Bool[Array, "B T"]) -> jax.Array:
    return jnp.maximum(real.sum(), 1)
