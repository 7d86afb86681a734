"""Noisy top-k gating, the router of the first sparse mixture (Shazeer et al. 2017, arXiv:1701.06538)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from archlab.experts.routers import Router, Routing, TopK, largest, router_key
from archlab.layers.alphabet import parameter, project
from archlab.layers.config import require
from archlab.layers.contract import Place, Tokens, wide


class NoisyTopK(Router):
    """Softmax over the `k` largest of `H = x W + N(0, 1) softplus(x W_noise)` (equations 3 to 5).

    The noise, in the training form only, keeps the load even and lets a loss on it be differentiable: use
    `balance=(ImportanceLoss(), LoadLoss())`. All weights start at zero, so that noise alone decides (appendix A).
    """

    k: int
    noisy = True

    def __post_init__(self):
        require(self.k >= 2, self, "k", "must be at least 2: a single weight of a softmax is 1 and teaches nothing")

    def check(self, experts: int) -> None:
        require(self.k < experts, self, "k", f"must be less than the number of experts, {experts}: noise cannot decide "
                "among all of them")

    def weigh(self, gates, experts):
        return TopK(self.k, renormalise=True).weigh(gates, experts)

    def build(self, rngs, at, experts, scale):
        return NoisyTopKModule(self, rngs, at, experts)


class NoisyTopKModule(nnx.Module):
    """Weights: weight and noise [D, E]."""

    def __init__(self, config: NoisyTopK, rngs: nnx.Rngs, at: Place, experts: int):
        self.config = config
        self.weight = parameter(rngs, "D->E", (at.width, experts), nnx.initializers.zeros)
        self.noise = parameter(rngs, "D->E", (at.width, experts), nnx.initializers.zeros)

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens) -> Routing:
        x, rule = wide(x), TopK(self.config.k, renormalise=True)
        clean = project(x, self.weight, "BTD,DE->BTE")
        if tokens.training is None:
            return rule(clean)
        spread = jax.nn.softplus(project(x, self.noise, "BTD,DE->BTE"))
        noisy = clean + spread * jax.random.normal(router_key(tokens), clean.shape, clean.dtype)
        return dataclasses.replace(rule(noisy), chances=chances(clean, noisy, spread, self.config.k))


def chances(clean: Float[Array, "B T E"], noisy: Float[Array, "B T E"], spread: Float[Array, "B T E"],
            k: int) -> Float[Array, "B T E"]:
    """How likely each expert is to be among the `k` best if its own noise, and only that, were drawn again (equations 8
    and 9): it must pass the k-th best of the others, the k-th of all or, where it is among these itself, the next."""
    best = largest(noisy, k + 1)[0]
    last, next_ = best[..., k - 1, None], best[..., k, None]
    return jax.scipy.stats.norm.cdf((clean - jnp.where(noisy > next_, next_, last)) / spread)
