"""Experts drawn at random: from the router's probabilities, or by a hash that learns nothing."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.experts.routers import LinearModule, Router, Routing, TopK, largest, pick, router_key
from archlab.layers.alphabet import project
from archlab.layers.config import Config, require
from archlab.layers.contract import Aux, Policy, Tokens, wide


class Reinforce(Config):
    """How a draw is trained by REINFORCE (`training/reinforce.py`).

    weight: of its loss. discount: what is charged besides a token's own loss, later tokens of its document, each
    `discount` times the one before it.
    """

    weight: float = 1.0
    discount: float = 0.0

    def __post_init__(self):
        require(self.weight > 0, self, "weight", "must be positive (for no such training leave it out: None)")
        require(0 <= self.discount < 1, self, "discount", "must lie in [0, 1)")

    def policy(self, log_prob: Float[Array, "B T"], cost: Float[Array, "B T"]) -> Policy:
        """What `Aux.policies` wants to hear."""
        return Policy(log_prob, cost, jnp.asarray(self.weight, cost.dtype), jnp.asarray(self.discount, cost.dtype))


class Sampled(Router):
    """In the training form `k` experts are drawn from the softmax, one after another without replacement; otherwise
    the best are taken. The weights are the probabilities (Switch, arXiv:2101.03961, appendix C).

    reinforce: trains the draw by what came of it, besides the gradient through the weights; None for that alone.
    """

    k: int
    reinforce: Reinforce | None = None

    def __post_init__(self):
        require(self.k >= 1, self, "k", "must be at least 1")

    def build(self, rngs, at, experts, scale):
        return SampledModule(self, rngs, at, experts, scale)


class SampledModule(LinearModule):
    """Weight: weight [D, E]. Policy: draw."""

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens) -> Routing:
        logits = project(wide(x), self.weight, "BTD,DE->BTE")
        best = TopK(self.config.k)(logits)
        if tokens.training is None:
            return best
        experts, aux = draw(logits, self.config.k, router_key(tokens)), Aux()
        if self.config.reinforce is not None:
            log_prob = log_chance(logits, experts)
            aux.policies["draw"] = self.config.reinforce.policy(log_prob, jnp.zeros_like(log_prob))
        return dataclasses.replace(best, experts=experts, weights=pick(best.gates, experts), aux=aux)


def draw(logits: Float[Array, "B T E"], k: int, key: jax.Array) -> Int[Array, "B T k"]:
    """`k` experts from the softmax, one after another without replacement: the largest of the logits with Gumbel noise
    (Kool et al. 2019, arXiv:1903.06059)."""
    return largest(logits + jax.random.gumbel(key, logits.shape, logits.dtype), k)[1]


def log_chance(logits: Float[Array, "B T E"], experts: Int[Array, "B T k"]) -> Float[Array, "B T"]:
    """The log-probability that `draw` gives these, in this order."""
    hits = experts[..., None] == jnp.arange(logits.shape[-1])
    gone = jnp.cumsum(hits, -2) - hits > 0
    left = jax.nn.logsumexp(jnp.where(gone, -jnp.inf, logits[..., None, :]), -1)
    return (pick(logits, experts) - left).sum(-1)


class RandomRouter(Router):
    """A control that learns nothing: `k` experts by a hash of a token's place in its document, each with weight 1 / k.

    Whatever a text is split, packed or padded into, a token's experts are the same; so they are in every layer with
    the same `seed`. It has no parameters, and no balance loss has a gradient.
    """

    k: int
    seed: int = 0

    def __post_init__(self):
        require(self.k >= 1, self, "k", "must be at least 1")

    def weigh(self, gates, experts):
        return jnp.where(experts < gates.shape[-1], 1 / self.k, jnp.zeros((), gates.dtype))

    def build(self, rngs, at, experts, scale):
        return RandomRouterModule(self, experts)


class RandomRouterModule(nnx.Module):
    """Nothing but its config."""

    def __init__(self, config: RandomRouter, experts: int):
        self.config, self.experts = config, experts

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens) -> Routing:
        key, E = jax.random.key(self.config.seed), self.experts
        number = lambda place: jax.random.uniform(jax.random.fold_in(key, place), (E,), jnp.float32)
        experts = largest(jax.vmap(jax.vmap(number))(tokens.positions), self.config.k)[1]
        logits = jnp.zeros((*experts.shape[:2], E), wide(x).dtype)
        even = jnp.full_like(logits, 1 / E)
        return Routing(experts, self.config.weigh(even, experts), even, even, logits)
