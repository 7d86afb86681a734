"""Mamba-2: a selective state-space layer whose heads each decay at one rate, so that products of matrices compute it.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T        y_t = C_t S_t + D x_t

Dao & Gu 2024 (arXiv:2405.21060), section 7: x, B and C come out of one projection and one short convolution; the gate
acts before the last norm. Initialised as the published code does it.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, pytree, wide
from archlab.layers.mlp import add_bias
from archlab.layers.norms import NormModule, RMSNorm
from archlab.recurrence.convolution import CausalConv, ConvState
from archlab.recurrence.forms import Form
from archlab.recurrence.memory import MemoryState
from archlab.recurrence.scalar_decay import scalar_decay
from archlab.recurrence.step_size import step_bias


class Mamba2(LayerConfig):
    """The SSD layer.

    state: N. head_size: P; there are H = expand * D / P heads. groups: G; heads of a group share B and C, and the norm
    is taken over each group. conv: the width of the convolution. step_limits: between which dt is kept, after the
    softplus; None for any. bias: of the in- and out-projections. conv_bias: of the convolution. eps: of the norm.
    """

    state: int = 128
    head_size: int = 64
    groups: int = 1
    conv: int = 4
    expand: int = 2
    step_limits: tuple[float, float] | None = None
    bias: bool = False
    conv_bias: bool = True
    eps: float = 1e-5
    form: Form | None = None

    def __post_init__(self):
        for field in ("state", "head_size", "groups", "conv", "expand"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")
        low, high = self.step_limits or (0.0, math.inf)
        require(0 <= low <= high, self, "step_limits", "must be a least and a largest step, neither below 0")

    def check(self, width: int) -> None:
        inner = self.expand * width
        require(inner % self.head_size == 0, self, "head_size", f"must divide expand * width = {inner}")
        heads = inner // self.head_size
        require(heads % self.groups == 0, self, "groups", f"must divide the {heads} heads")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "Mamba2Module":
        return Mamba2Module(self, rngs, at)


@pytree
class Mamba2State:
    """conv: the convolution's last inputs; memory: S [B, H, N, P] and the last document met."""

    conv: ConvState
    memory: MemoryState


class Mamba2Module(Layer):
    """Weights: gate [D, F]; into [D, F + 2 G N], to x, B and C; step [D, H]; dt_bias, A_log and skip [H]; conv; norm
    [G, F / G]; out [F, D]; biases of the projections (gate_bias, into_bias, step_bias, out_bias) where there are any.
    Trace: step_size [B, T], the mean step over heads."""

    def __init__(self, config: Mamba2, rngs: nnx.Rngs, at: Place):
        self.config = config
        D, F, GN = at.width, config.expand * at.width, config.groups * config.state
        H = F // config.head_size
        uniform = lambda bound: lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1, 1) * bound
        bias = lambda letters, n: parameter(rngs, letters, (n,)) if config.bias else None
        self.gate, self.gate_bias = parameter(rngs, "D->F", (D, F), uniform(D**-0.5)), bias("->F", F)
        self.into = parameter(rngs, "D->F", (D, F + 2 * GN), uniform(D**-0.5))
        self.into_bias = bias("->F", F + 2 * GN)
        self.step, self.step_bias = parameter(rngs, "D->H", (D, H), uniform(D**-0.5)), bias("->H", H)
        self.dt_bias = parameter(rngs, "->H", (H,), step_bias)
        self.conv = CausalConv(config.conv, F + 2 * GN, rngs, config.conv_bias)
        rates = lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, 1, 16))
        self.A_log = parameter(rngs, "->H", (H,), rates)
        self.skip = parameter(rngs, "->H", (H,), nnx.initializers.ones)
        self.norm = NormModule(RMSNorm(config.eps), rngs, (config.groups, F // config.groups), "->GF")
        self.out = parameter(rngs, "F->D", (F, D), uniform((F * at.sharers) ** -0.5))
        self.out_bias = bias("->D", D)

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        H, P, N = self.A_log.shape[0], self.config.head_size, self.config.state
        return Mamba2State(self.conv.init_state(batch, dtype), MemoryState.zeros(batch, H, N, P, dtype))

    def __call__(self, x, tokens: Tokens, state: Mamba2State | None = None):
        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        u = add_bias(project(x, self.into, "BTD,DF->BTF"), self.into_bias)
        u, conv = self.conv(u, tokens, None if state is None else state.conv)
        dt = add_bias(project(x, self.step, "BTD,DH->BTH"), self.step_bias)
        gate = add_bias(project(x, self.gate, "BTD,DF->BTF"), self.gate_bias)

        # What is cheap to compute again is not kept for the gradient: it would be most of a layer's memory.
        u, B, C, v, dt = jax.checkpoint(self.inputs)(u, dt)
        log_decay = -jnp.exp(wide(self.A_log[...]))[:, None] * dt
        y, memory = scalar_decay(C, B, v, log_decay, tokens, past.memory, self.config.form)
        y = jax.checkpoint(self.finish)(y, u, gate)

        aux = Aux(traces={"step_size": jnp.where(tokens.real, dt.mean(1), 0)})
        state = None if state is None else Mamba2State(conv, memory)
        return add_bias(project(y, self.out, "BTF,FD->BTD"), self.out_bias), state, aux

    def inputs(self, u: Float[Array, "B T F"], dt: Float[Array, "B T H"]):
        """u [B, H, T, P], B and C [B, G, T, N], dt u [B, H, T, P] and dt [B, H, T] of what the convolution gives and of
        raw step sizes."""
        F, G = self.out.shape[0], self.config.groups
        u, B, C = jnp.split(jax.nn.silu(u), [F, F + G * self.config.state], axis=-1)
        u, B, C = _heads(u, self.A_log.shape[0]), _heads(B, G), _heads(C, G)
        dt = jnp.swapaxes(jax.nn.softplus(wide(dt) + self.dt_bias[...]), 1, 2)
        if self.config.step_limits:
            dt = jnp.clip(dt, *self.config.step_limits)
        return u, B, C, dt[..., None] * wide(u), dt

    def finish(self, y: Float[Array, "B H T P"], u: Float[Array, "B H T P"], gate: Float[Array, "B T F"]):
        """The skip, the gate and the norm: [B, T, F]."""
        y = y + self.skip[...][:, None, None] * wide(u)
        y = jnp.moveaxis(y.astype(gate.dtype), 1, 2).reshape(gate.shape) * jax.nn.silu(gate)
        return self.norm(y.reshape(*y.shape[:2], self.config.groups, -1)).reshape(y.shape)


def _heads(a: Float[Array, "B T F"], heads: int) -> Float[Array, "B H T P"]:
    """Heads before time, for products of one matrix a head."""
    return jnp.moveaxis(a.reshape(*a.shape[:2], heads, -1), 2, 1)
