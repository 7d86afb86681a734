"""Mamba: a gated selective state-space layer (Gu & Dao 2023, arXiv:2312.00752).

Initialisation, and what keeps its values out of weight decay, as in section 3.6 and the published implementation.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, document_starts, pytree, wide
from archlab.layers.mlp import add_bias
from archlab.layers.norms import Norm
from archlab.layers.sharding import per_shard
from archlab.recurrence.convolution import CausalConv, ConvState
from archlab.recurrence.forms import Form
from archlab.recurrence.selective_scan import selective_scan, signed_scan
from archlab.recurrence.step_size import step_bias


class Mamba(LayerConfig):
    """The S6 layer: in-projection, short convolution, selective scan, gate, out-projection.

    state: N. conv: the width of the convolution. expand: F = expand * D. dt_rank: rank of the step-size map; None for
    ceil(D / 16). inner_norm: a norm on each of dt, B and C (Jamba, arXiv:2403.19887, section 6.3; FalconMamba's,
    arXiv:2410.05355, have no gains). bias: of the in- and out-projections. conv_bias: of the convolution. negative:
    decays from -1 to 1 instead of from 0 (`signed_scan`), for following a state; takes N times the memory. form: of the
    recurrence; None to choose.
    """

    state: int = 16
    conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    inner_norm: Norm | None = None
    bias: bool = False
    conv_bias: bool = True
    negative: bool = False
    form: Form | None = None

    def __post_init__(self):
        for field in ("state", "conv", "expand"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")
        require(self.dt_rank is None or self.dt_rank >= 1, self, "dt_rank", "must be at least 1, or None for D / 16")

    def rank(self, width: int) -> int:
        """R, the rank of the step-size map."""
        return self.dt_rank or math.ceil(width / 16)

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "MambaModule":
        return MambaModule(self, rngs, at)


@pytree
class MambaState:
    """conv: the convolution's last inputs; hidden [B, F, N], at least float32; segment [B]: the last document met."""

    conv: ConvState
    hidden: Float[Array, "B F N"]
    segment: Int[Array, "B"]


class MambaModule(Layer):
    """Weights: into [D, F] and gate [D, F]; conv; select [F, R + 2N]; step [R, F] and its bias [F]; A_log [F, N];
    skip [F]; out [F, D]; into_bias [F], gate_bias [F], out_bias [D] where there are any. Trace: step_size [B, T], the
    mean step over channels."""

    def __init__(self, config: Mamba, rngs: nnx.Rngs, at: Place):
        D, F, N = at.width, config.expand * at.width, config.state
        R, self.scan = config.rank(D), functools.partial(signed_scan if config.negative else selective_scan,
                                                         form=config.form)
        uniform = lambda bound: lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1, 1) * bound
        # Bounds 1/sqrt(fan_in) are the default of the framework the published model was trained in.
        self.into = parameter(rngs, "D->F", (D, F), uniform(D**-0.5))
        self.gate = parameter(rngs, "D->F", (D, F), uniform(D**-0.5))
        bias = lambda letters, n: parameter(rngs, letters, (n,)) if config.bias else None
        self.into_bias, self.gate_bias, self.out_bias = bias("->F", F), bias("->F", F), bias("->D", D)
        self.conv = CausalConv(config.conv, F, rngs, config.conv_bias)
        self.select = parameter(rngs, "F->.", (F, R + 2 * N), uniform(F**-0.5))
        self.step = parameter(rngs, ".->F", (R, F), uniform(R**-0.5))
        self.step_bias = parameter(rngs, "->F", (F,), step_bias)
        # S4D-Real: rates 1 to N, the same in every channel
        rates = lambda key, shape, dtype: jnp.broadcast_to(jnp.log(jnp.arange(1, N + 1, dtype=dtype)), shape)
        self.A_log = parameter(rngs, "->FN", (F, N), rates)
        self.skip = parameter(rngs, "->F", (F,), nnx.initializers.ones)
        self.out = parameter(rngs, "F->D", (F, D), uniform((F * at.sharers) ** -0.5))
        inner = config.inner_norm
        self.norms = nnx.List([inner.build(rngs, Place(n), ".") for n in (R, N, N)] if inner else [])

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        hidden = jnp.zeros((batch, *self.A_log.shape), jnp.promote_types(dtype, jnp.float32))
        return MambaState(self.conv.init_state(batch, dtype), hidden, jnp.zeros((batch,), jnp.int32))

    def __call__(self, x, tokens: Tokens, state: MambaState | None = None):
        u = add_bias(project(x, self.into, "BTD,DF->BTF"), self.into_bias)
        u, conv = self.conv(u, tokens, None if state is None else state.conv)
        u = jax.nn.silu(u)

        R, N = self.step.shape[0], self.A_log.shape[1]
        dt, B, C = jnp.split(project(u, self.select, "BTF,FR->BTR"), [R, R + N], axis=-1)
        if len(self.norms):
            dt, B, C = (norm(a) for norm, a in zip(self.norms, (dt, B, C)))
        dt = jax.nn.softplus(wide(project(dt, self.step, "BTR,RF->BTF")) + self.step_bias[...])
        dt = jnp.where(tokens.real[:, :, None], dt, 0)  # a step of size 0 leaves the state as it is

        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        starts, last = document_starts(tokens.segments, past.segment)
        A = -jnp.exp(wide(self.A_log[...]))
        scan = per_shard(self.scan, "BTF BTF FN BTN BTN BT BFN", "BTF BFN")
        y, hidden = scan(u, dt, A, B, C, starts, past.hidden)
        gate = add_bias(project(x, self.gate, "BTD,DF->BTF"), self.gate_bias)
        y = (y + self.skip[...] * wide(u)).astype(x.dtype) * jax.nn.silu(gate)

        state = None if state is None else MambaState(conv, hidden, last)
        aux = Aux(traces={"step_size": dt.mean(-1)})
        return add_bias(project(y, self.out, "BTF,FD->BTD"), self.out_bias), state, aux

