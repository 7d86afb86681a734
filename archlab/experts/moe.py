"""The mixture-of-experts layer: a router sends each token to a few of many MLPs.

Shazeer et al. 2017 (arXiv:1701.06538); Switch: Fedus et al. 2021 (arXiv:2101.03961). Fine-grained and shared experts
(DeepSeekMoE, arXiv:2401.06066) are expressions: `Parallel(MoE(64, 1408, TopK(6)), SwiGLU(2816))`.
"""

import math

import jax.numpy as jnp
from flax import nnx

from archlab.experts.balance import Balance, LoadLoss, SwitchLoss, ZLoss, routing_traces
from archlab.experts.capacity import Capacity
from archlab.experts.dispatch import Experts
from archlab.experts.parallel import run_experts
from archlab.experts.routers import Router, TopK
from archlab.layers.alphabet import parameter
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens
from archlab.layers.mlp import ClippedSwiGLU, check_activation, residual_scale
from archlab.layers.sharding import per_shard


class MoE(LayerConfig):
    """`sum_j weight_j * expert_j(x)` over the experts that the router chose.

    experts: E. hidden: F of each expert. capacity: bounds what an expert takes in the training form; None: nothing is
    dropped. Without training nothing ever is. balance: the losses that keep the load even and the router modest.
    activation, gated, bias: of the experts, as in `MLP`. scale_input: the weights scale what the experts read instead
    of what they give (Llama 4). init_scale: multiplies the variance of all initial weights (Switch: 0.1).
    """

    experts: int
    hidden: int
    router: Router = TopK(2, renormalise=True)
    capacity: Capacity | None = None
    balance: tuple[Balance, ...] = (SwitchLoss(), ZLoss())
    activation: str | ClippedSwiGLU = "silu"
    gated: bool = True
    bias: bool = False
    scale_input: bool = False
    init_scale: float = 1.0

    def __post_init__(self):
        require(self.experts >= 1, self, "experts", "must be at least 1")
        require(self.hidden >= 1, self, "hidden", "must be at least 1")
        self.router.check(self.experts)
        require(self.capacity is None or not self.router.looks_ahead, self, "capacity",
                f"{type(self.router).__name__} bounds by itself what an expert takes: leave it None")
        require(all(isinstance(b, Balance) for b in self.balance), self, "balance",
                "must be a tuple of losses, such as (SwitchLoss(),)")
        names = [b.name for b in self.balance]
        require(len(set(names)) == len(names), self, "balance", "has the same loss twice")
        kinds = {type(b) for b in self.balance}
        require(self.router.noisy or LoadLoss not in kinds, self, "balance",
                "LoadLoss judges how likely each choice was: it wants a router with noise, such as NoisyTopK(2)")
        require(not self.router.looks_ahead or SwitchLoss not in kinds, self, "balance",
                f"the load of {type(self.router).__name__} is even by construction: give balance=(ZLoss(),)")
        check_activation(self)
        require(self.init_scale > 0, self, "init_scale", "must be positive")

    @property
    def looks_ahead(self) -> bool:
        return self.router.looks_ahead

    def build(self, rngs: nnx.Rngs, at: Place) -> "MoEModule":
        return MoEModule(self, rngs, at)


class MoEModule(Layer):
    """Weights: those of the router; up and gate [E, D, F], down [E, F, D], and their biases [E, F] and [E, D].

    Losses: by the names of `config.balance`. Traces: those of `routing_traces`; dropped, the share of choices that
    found no room; and where there is a capacity kept [B, T, k], who took each choice in the end, -1 for nobody.
    """

    def __init__(self, config: MoE, rngs: nnx.Rngs, at: Place):
        D, E, F = at.width, config.experts, config.hidden
        scale, uses = math.sqrt(config.init_scale), config.router.used(E) / E
        weight = lambda *about, scale=scale: parameter(rngs, *about, scale=scale, uses=uses)
        self.config = config
        self.router = config.router.build(rngs, at, E, scale)
        self.up = weight("ED->F", (E, D, F))
        self.gate = weight("ED->F", (E, D, F)) if config.gated else None
        self.down = weight("EF->D", (E, F, D), scale=scale * residual_scale(at))
        self.up_bias = weight("E->F", (E, F)) if config.bias else None
        self.gate_bias = weight("E->F", (E, F)) if config.bias and config.gated else None
        self.down_bias = weight("E->D", (E, D)) if config.bias else None

    def __call__(self, x, tokens: Tokens, state=None):
        config, real, E = self.config, tokens.real, self.config.experts
        routing = self.router(x, tokens)
        experts, weights, capacity = jnp.where(real[..., None], routing.experts, E), routing.weights, routing.room
        kept, shape, traces = experts, x.shape, routing_traces(routing, real)  # E: padding goes to nobody
        if tokens.training is not None and config.capacity is not None:
            asked, kept, capacity = self._fit(experts, routing.gates, real)
            weights = weights if not config.capacity.reroute else config.router.weigh(routing.gates, asked)
            traces["kept"] = jnp.where(kept < E, kept, -1)
            join = lambda a: a.reshape(-1, config.capacity.rows * a.shape[1], a.shape[2])
            x, kept, weights = join(x), join(kept), join(weights)
        if config.scale_input:
            x, kept, weights = _scaled(x, kept, weights)
            y = run_experts(x, kept, weights, self.weights(), capacity)
            y = y.reshape(*shape[:2], -1, shape[2]).sum(2)
        else:
            y = run_experts(x, kept, weights, self.weights(), capacity).reshape(shape)

        losses = {loss.name: loss.weight * loss(routing, real) for loss in config.balance}
        wanted = (experts < E).sum()
        dropped = (wanted - (kept < E).sum()) / jnp.maximum(wanted, 1)
        return y, None, routing.aux.under("router") | Aux(losses, traces | {"dropped": dropped})

    def weights(self) -> Experts:
        """The experts' weights as arrays."""
        value = lambda weight: None if weight is None else weight[...]
        return Experts(value(self.up), value(self.gate), value(self.down), value(self.up_bias), value(self.gate_bias),
                       value(self.down_bias), self.config.activation)

    def _fit(self, experts, gates, real):
        """What each choice asked for in the end and whom it got, [B, T, k], and the room of an expert for one group of
        rows."""
        capacity, rows, (B, T, k) = self.config.capacity, self.config.capacity.rows, experts.shape
        if B % rows:
            raise ValueError(f"Capacity.rows = {rows}: must divide the {B} rows of the batch (of a micro-batch, where "
                             "there are several)")
        room = capacity.room(k, self.config.experts, rows * T)
        join = lambda a: a.reshape(B // rows, rows * T, *a.shape[2:])
        fit = per_shard(capacity.fit, "BT. BT. B", "BT. BT.")  # as routers choose
        asked, kept = fit(join(experts), join(gates), jnp.asarray(room)[join(real).sum(1)])
        return asked.reshape(B, T, k), kept.reshape(B, T, k), int(room[-1])


def _scaled(x, experts, weights):
    """Each choice as a token of its own, which its weight scales: [B, T k, D], with experts and weights [B, T k, 1]."""
    B, T, k = experts.shape
    scaled = x[:, :, None] * weights[..., None].astype(x.dtype)
    apart = lambda a: a.reshape(B, T * k, -1)
    return apart(scaled), apart(experts), jnp.ones((B, T * k, 1), weights.dtype)
