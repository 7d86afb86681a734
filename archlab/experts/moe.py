"""The mixture-of-experts layer: a router sends each token to a few of many MLPs.

Shazeer et al. 2017 (arXiv:1701.06538); Switch: Fedus et al. 2021 (arXiv:2101.03961); the router's arithmetic in
float32 whatever the compute dtype, without which training diverges: Switch, section 2.4.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.experts.capacity import fit, rows_per_expert
from archlab.experts.dispatch import Experts
from archlab.experts.parallel import run_experts
from archlab.experts.routers import TopK, balance_loss, routing_traces, z_loss
from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, near, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, wide
from archlab.layers.mlp import ACTIVATIONS, residual_scale


class MoE(LayerConfig):
    """Token-choice experts: `sum_j weight_j * expert_j(x)` over the chosen ones.

    experts: E. hidden: F of each expert. router: how many each token goes to, and with what weights.
    capacity_factor: in the training form an expert takes `ceil(capacity_factor * k * n / E)` tokens of a sequence of n,
    the first to come; a choice that finds it full adds nothing. None: nothing is dropped. Without training nothing
    ever is.
    balance_loss, z_loss: coefficients (`routers`). jitter: in the training form the router's input, and only that, is
    multiplied by U(1 - jitter, 1 + jitter) (Switch: 0.01). activation, gated: of the experts, as in `MLP`.
    """

    experts: int
    hidden: int
    router: TopK = TopK(2, softmax="after")
    capacity_factor: float | None = None
    balance_loss: float = 0.01
    z_loss: float = 0.001
    jitter: float = 0.0
    activation: str = "silu"
    gated: bool = True

    def __post_init__(self):
        require(self.experts >= 1, self, "experts", "must be at least 1")
        require(self.hidden >= 1, self, "hidden", "must be at least 1")
        require(self.router.k <= self.experts, self, "router", f"must choose no more than experts = {self.experts}")
        require(self.capacity_factor is None or self.capacity_factor > 0, self, "capacity_factor",
                "must be positive, or None to drop nothing")
        for field in ("balance_loss", "z_loss"):
            require(getattr(self, field) >= 0, self, field, "must not be negative")
        require(0 <= self.jitter < 1, self, "jitter", "must lie in [0, 1)")
        require(self.activation in ACTIVATIONS, self, "activation", near(str(self.activation), ACTIVATIONS))

    def build(self, rngs: nnx.Rngs, at: Place) -> "MoEModule":
        return MoEModule(self, rngs, at)


class MoEModule(Layer):
    """Weights: router [D, E], up and gate [E, D, F], down [E, F, D].

    Losses: balance, router_z. Traces: those of `routing_traces`, and dropped, the share of choices that found their
    expert full.
    """

    def __init__(self, config: MoE, rngs: nnx.Rngs, at: Place):
        D, E, F = at.width, config.experts, config.hidden
        uses = config.router.k / E
        self.config = config
        self.router = parameter(rngs, "D->E", (D, E))
        self.up = parameter(rngs, "ED->F", (E, D, F), uses=uses)
        self.gate = parameter(rngs, "ED->F", (E, D, F), uses=uses) if config.gated else None
        self.down = parameter(rngs, "EF->D", (E, F, D), scale=residual_scale(at), uses=uses)

    def __call__(self, x, tokens: Tokens, state=None):
        config, real, E = self.config, tokens.real, self.config.experts
        logits = project(self._router_input(x, tokens), self.router, "BTD,DE->BTE")
        routing = config.router(logits)
        experts, capacity = jnp.where(real[..., None], routing.experts, E), None  # E: padding goes to nobody
        kept = experts
        if tokens.training is not None and config.capacity_factor is not None:
            room = rows_per_expert(config.capacity_factor, config.router.k, E, x.shape[1])
            kept, capacity = fit(experts, E, jnp.asarray(room)[real.sum(1)]), int(room[-1])

        gate = None if self.gate is None else self.gate[...]
        params = Experts(self.up[...], gate, self.down[...], ACTIVATIONS[config.activation])
        y = run_experts(x, kept, routing.weights, params, capacity)

        losses = {"balance": config.balance_loss * balance_loss(routing, real),
                  "router_z": config.z_loss * z_loss(logits, real)}
        dropped = (kept != experts).sum() / jnp.maximum((experts < E).sum(), 1)
        return y, None, Aux(losses, routing_traces(routing, real) | {"dropped": dropped})

    def _router_input(self, x, tokens: Tokens):
        """`x` in at least float32, jittered in the training form."""
        x, jitter = wide(x), self.config.jitter
        if tokens.training is None or not jitter:
            return x
        key = jax.random.fold_in(tokens.training.key, 1)  # the key itself is the enclosing block's, for its dropout
        return x * jax.random.uniform(key, x.shape, x.dtype, 1 - jitter, 1 + jitter)
