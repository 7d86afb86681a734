"""H3: two state spaces between gates, so that a token can be compared with those before it (Fu et al. 2022,
arXiv:2212.14052, section 3)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, pytree, wide
from archlab.layers.mlp import add_bias, residual_scale
from archlab.recurrence.convolution import ConvState
from archlab.recurrence.long_convolution import finite_convolution
from archlab.recurrence.s4d import DiagonalSSM, check_system
from archlab.recurrence.state_space import StateSpaceState, run


class H3(LayerConfig):
    """`q * diagonal(shift(k) * v)`: the shift state space is a convolution with the last N tokens, the diagonal one is
    S4D-Lin.

    state: N of both. head_dim: P; a head holds the outer product of P keys and P values, and its queries read it.
    discretisation: of the diagonal one, "bilinear" (as published) or "zoh". dt_min, dt_max: the range of its step sizes
    at the start.
    """

    state: int = 64
    head_dim: int = 1
    discretisation: str = "bilinear"
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    def __post_init__(self):
        check_system(self)
        require(self.head_dim >= 1, self, "head_dim", "must be at least 1")

    @property
    def recurrent(self) -> bool:
        return True

    def check(self, width):
        require(width % self.head_dim == 0, self, "head_dim", f"must divide the width {width}")

    def build(self, rngs: nnx.Rngs, at: Place) -> "H3Module":
        return H3Module(self, rngs, at)


@pytree
class H3State:
    """shift: the last N - 1 keys. memory: the state of the diagonal system, hidden [B, P P, H, N / 2]."""

    shift: ConvState
    memory: StateSpaceState


class H3Module(Layer):
    """Weights: into [D, 3, D] (query, key, value) and its bias; shift [N, D] and shift_skip [D]; those of `ssm`, H
    channels; skip [H]; out [D, D] and its bias."""

    def __init__(self, config: H3, rngs: nnx.Rngs, at: Place):
        D, N = at.width, config.state
        self.config, heads = config, at.width // config.head_dim
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -N**-0.5, N**-0.5)
        self.into = parameter(rngs, "D->.F", (D, 3, D))
        self.into_bias = parameter(rngs, "->.F", (3, D))
        self.shift = parameter(rngs, "->.F", (N, D), uniform, decay=True)
        self.shift_skip = parameter(rngs, "->F", (D,), jax.random.normal)
        self.ssm = DiagonalSSM(heads, N, "lin", config.discretisation, (config.dt_min, config.dt_max), rngs)
        self.skip = parameter(rngs, "->H", (heads,), jax.random.normal)
        self.out = parameter(rngs, "F->D", (D, D), scale=residual_scale(at))
        self.out_bias = parameter(rngs, "->D", (D,))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        (N, D), P = self.shift.shape, self.config.head_dim
        shift = ConvState(jnp.zeros((batch, N - 1, D), dtype), jnp.zeros((batch, N - 1), jnp.int32))
        memory = self.ssm.init_state(batch, dtype)
        hidden = jnp.broadcast_to(memory.hidden[:, None], (batch, P * P, *memory.hidden.shape[1:]))
        return H3State(shift, dataclasses.replace(memory, hidden=hidden))

    def __call__(self, x, tokens: Tokens, state: H3State | None = None):
        B, T, D = x.shape
        P, H = self.config.head_dim, D // self.config.head_dim
        q, k, v = jnp.moveaxis(add_bias(project(x, self.into, "BTD,DCF->BTCF"), self.into_bias), 2, 0)
        shifted, shift = finite_convolution(k, self.shift[...], tokens, None if state is None else state.shift)
        k = shifted + self.shift_skip[...] * k
        heads = lambda a: wide(a).reshape(B, T, H, P)
        kv = heads(k)[..., :, None] * heads(v)[..., None, :]  # [B, T, H, P, P]
        y, memory = self.remember(jnp.moveaxis(kv, 2, 4).reshape(B, T, P * P, H), tokens, state)
        y = jnp.moveaxis(y.reshape(B, T, P, P, H), 4, 2) + self.skip[...][:, None, None] * kv
        y = (heads(q)[..., :, None] * y).sum(3).reshape(B, T, D).astype(x.dtype)
        state = None if state is None else H3State(shift, memory)
        return add_bias(project(y, self.out, "BTF,FD->BTD"), self.out_bias), state, Aux()

    def remember(self, kv, tokens: Tokens, state: H3State | None):
        """The diagonal system over [B, T, P P, H]: entries of one head share its weights, as rows of a batch do."""
        B, T, E, H = kv.shape
        entries = lambda a: jnp.repeat(a, E, 0)
        many = dataclasses.replace(tokens, segments=entries(tokens.segments), positions=entries(tokens.positions))
        past = None
        if state is not None:
            hidden = state.memory.hidden
            past = StateSpaceState(hidden.reshape(B * E, *hidden.shape[2:]), entries(state.memory.segment))
        y, new = run(self.ssm.system(T), jnp.moveaxis(kv, 2, 1).reshape(B * E, T, H), many, past)
        if state is not None:
            new = StateSpaceState(new.hidden.reshape(hidden.shape), new.segment[::E])
        return jnp.moveaxis(y.reshape(B, E, T, H), 1, 2), new
