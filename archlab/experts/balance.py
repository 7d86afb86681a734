"""What an unbalanced or overconfident router costs. Pure functions of a `Routing`; padding counts for nothing.

Statistics are sums over all real tokens of the global batch, whatever the mesh; of a micro-batch where there are
several, for these losses are not linear in the batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from archlab.experts.routers import Routing, choices_of
from archlab.layers.config import Config, near, require
from archlab.layers.contract import wide


class Balance(Config):
    """Base of the losses, which all have a `weight` and a `name`."""

    def __post_init__(self):
        require(self.weight >= 0, self, "weight", "must not be negative")

    def __call__(self, routing: Routing, real: Bool[Array, "B T"]) -> jax.Array:
        """The loss, its weight not yet applied."""
        raise TypeError(f"{type(self).__name__} does not say what it costs")


class SwitchLoss(Balance):
    """Switch Transformer's load-balancing loss (arXiv:2101.03961, section 2.2): `E * sum_i f_i P_i`.

    f_i is expert i's share of the choices, before any are dropped, and P_i its mean probability. All k choices count
    and f sums to 1 (some codes let it sum to k): even routing costs 1 whatever k is, all on one expert costs E for
    k = 1. first: how many of the k choices count; None for all (GShard, arXiv:2006.16668: 1). per: "batch", or the
    mean over the losses of each "sequence" (DeepSeek-V3, arXiv:2412.19437, section 2.1.2, with a weight of 1e-4).
    """

    weight: float = 0.01
    per: str = "batch"
    first: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.per in ("batch", "sequence"), self, "per", near(str(self.per), ("batch", "sequence")))
        require(self.first is None or self.first >= 1, self, "first", "must be at least 1, or None for all")

    @property
    def name(self) -> str:
        return "balance" if self.per == "batch" else "sequence_balance"

    def __call__(self, routing, real):
        E, axes = routing.probs.shape[-1], (0, 1) if self.per == "batch" else (1,)
        hits = (routing.experts[..., : self.first, None] == jnp.arange(E)).sum(2)
        total = lambda values: jnp.where(real[..., None], values, 0).sum(axes)
        choices, mass = total(hits), total(routing.probs)
        share = lambda values: values / jnp.maximum(values.sum(-1, keepdims=True), 1e-9)
        cost = E * (share(choices) * share(mass)).sum(-1)
        some = real.any(axes)  # rows of padding alone are no sequences
        return jnp.where(some, cost, 0).sum() / jnp.maximum(some.sum(), 1)


class ImportanceLoss(Balance):
    """Squared coefficient of variation of the experts' importance, the sum of their weights (Shazeer et al. 2017,
    arXiv:1701.06538, equations 6 and 7, with a weight of 0.1). Even: 0; all on one expert: E - 1."""

    weight: float = 0.1
    name = "importance"

    def __call__(self, routing, real):
        E = routing.probs.shape[-1]
        hits = routing.experts[..., None] == jnp.arange(E)
        weights = jnp.where(real[..., None], routing.weights, 0)
        return squared_variation(jnp.einsum("BTk,BTkE->E", weights, hits.astype(weights.dtype)))


class LoadLoss(Balance):
    """Squared coefficient of variation of the experts' expected load under fresh noise (Shazeer et al. 2017, appendix
    A, with a weight of 0.1): wants a router with noise. Where none was drawn there is nothing to teach: the load is
    that of the choices themselves."""

    weight: float = 0.1
    name = "load"

    def __call__(self, routing, real):
        if routing.chances is None:
            return squared_variation(choices_of(routing.experts, real, routing.probs.shape[-1]))
        return squared_variation(jnp.where(real[..., None], routing.chances, 0).sum((0, 1)))


class ZLoss(Balance):
    """ST-MoE's router z-loss (arXiv:2202.08906, equation 5): the mean over real tokens of logsumexp(logits)^2."""

    weight: float = 0.001
    name = "router_z"

    def __call__(self, routing, real):
        size = jax.nn.logsumexp(wide(routing.logits), axis=-1)
        return jnp.where(real, size**2, 0).sum() / count(real)


def squared_variation(values: Float[Array, "E"]) -> jax.Array:
    """Variance over squared mean."""
    return values.var() / jnp.maximum(values.mean() ** 2, 1e-10)


def routing_traces(routing: Routing, real: Bool[Array, "B T"]) -> dict[str, jax.Array]:
    """What to look at, over the real tokens of the batch.

    load [E]: share of the choices. max_violation: max(load) / mean(load) - 1, 0 for perfect balance
    (arXiv:2408.15664). entropy: mean entropy in nats of a token's probabilities, low for a decided router;
    mean_entropy: entropy of their mean, log E for a balanced one. choices [B, T, k]: the experts, -1 for nobody;
    weights [B, T, k].
    largest_logit: the largest in absolute value; NaN where any is.
    """
    E = routing.probs.shape[-1]
    choices = choices_of(routing.experts, real, E).astype(routing.probs.dtype)
    load = choices / jnp.maximum(choices.sum(), 1)
    entropy = lambda p: -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1)
    mean = jnp.where(real[..., None], routing.probs, 0).sum((0, 1)) / count(real)
    return {"load": load, "max_violation": load.max() * E - 1,
            "entropy": jnp.where(real, entropy(routing.probs), 0).sum() / count(real), "mean_entropy": entropy(mean),
            "choices": jnp.where(real[..., None] & (routing.experts < E), routing.experts, -1),
            "weights": jnp.where(real[..., None], routing.weights, 0),
            "largest_logit": jnp.where(real[..., None], jnp.abs(routing.logits), 0).max()}


def count(real: Bool[Array, "B T"]) -> jax.Array:
    """The number of real tokens, at least 1."""
    return jnp.maximum(real.sum(), 1)
