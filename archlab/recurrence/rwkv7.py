"""RWKV-7, Goose: RWKV whose state is corrected where the token says, by the generalised delta rule.

Peng et al. 2025 (arXiv:2503.14456), section 4. With r, k, v, decays w in (0.545, 1), learning rates a in (0, 1) and
removal keys kk of length 1, every head computes

    S_t = diag(w_t) S_{t-1} - (a_t kk_t) (kk_t S_{t-1})^T + k_t v_t^T        y_t = r_t S_t

All but the first layer mix their values with those of the first, which has them for a trace that is published:

    first = Provide("first_value", Sequence(Residual(RWKV7(value_rank=None)), ...), trace="layers/0/layer/value")

Initialisation as in the published code of the layers (which a script beside it may replace by orthogonal matrices).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, wide
from archlab.recurrence.forms import Form
from archlab.recurrence.generalised_delta import generalised_delta
from archlab.recurrence.rwkv import (Depth, LowRank, TimeMixState, channels, check_heads, given, head_norm, matrices,
                                     orthogonal, span, uniform)
from archlab.recurrence.rwkv6 import toward
from archlab.recurrence.shift import ShiftState, token_before

FIRST = "first_value"  # the published value, [B, T, D]


class RWKV7(LayerConfig):
    """The time mix. head_size: K; the heads fill the stream. decay_rank, rate_rank, value_rank, gate_rank: of the maps
    from a token to its decays, learning rates, shares of the first layer's values, and gates; value_rank = None makes
    the first layer. negative: learning rates in (0, 2) instead of (0, 1), so that the transition's eigenvalue along the
    removal key, w - a, reaches -1 and not only -0.455; following a state wants that, and decays near 1.
    form: of the recurrence; None to choose."""

    head_size: int = 64
    decay_rank: int = 64
    rate_rank: int = 64
    value_rank: int | None = 32
    gate_rank: int = 128
    negative: bool = False
    form: Form | None = None

    def __post_init__(self):
        for field in ("head_size", "decay_rank", "rate_rank", "gate_rank"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")
        require(self.value_rank is None or self.value_rank >= 1, self, "value_rank",
                "must be at least 1, or None in the first layer")

    @property
    def recurrent(self) -> bool:
        return True

    def check(self, width: int) -> None:
        check_heads(self, width)

    def build(self, rngs: nnx.Rngs, at: Place) -> "RWKV7Module":
        return RWKV7Module(self, rngs, at)


class RWKV7Module(Layer):
    """Weights: receptance, key, value [D, H, K] and out [H, K, D]; what each takes of the token before,
    mix_{receptance,decay,key,value,rate,gate} [D]; decay, rate, gate and blend, each a `LowRank`; what makes removal
    keys of keys, removal, how far the learning rate scales keys, replacement, and bonus, each [H, K]; norm.

    Trace of the first layer: value [B, T, D]."""

    def __init__(self, config: RWKV7, rngs: nnx.Rngs, at: Place):
        D, K, depth = at.width, config.head_size, Depth.of(at)
        H = D // K
        powers = dict(receptance=0.2, decay=0.9, key=0.7, value=0.7, rate=0.9, gate=0.2)
        for name, power in powers.items():
            share = 1 - channels(D) ** (power * depth.falling)
            setattr(self, f"mix_{name}", parameter(rngs, "->D", (D,), given(share)))
        line, bend = span(D) - 0.5, bends(D, K)
        decay = -6 + 6 * span(D) ** (1 + depth.rising**0.3) + 0.5 + 2.5 * bend
        low_rank = lambda rank, bias, **more: LowRank(
            rngs, D, rank, H, orthogonal(0.1 * max(rank / D, 1) ** 0.5), bias, **more)
        self.decay = low_rank(config.decay_rank, decay, rate=2.0)
        self.rate = low_rank(config.rate_rank, -0.19 + 0.3 * bend + 0.4 * line)
        self.gate = low_rank(config.gate_rank, None)
        self.blend = None if config.value_rank is None else low_rank(config.value_rank, 0.73 - 0.4 * line)
        each = lambda values: parameter(rngs, "->HK", (H, K), given(values))
        self.removal, self.replacement = each(0.71 - 0.1 * line), each(jnp.full(D, 1.02))
        self.bonus = each(jnp.full(D, -0.04))
        self.receptance, self.value = (matrices(rngs, D, H, uniform(0.5 * D**-0.5)) for _ in range(2))
        self.key = matrices(rngs, D, H, uniform(0.05 * D**-0.5))
        self.out = parameter(rngs, "HK->D", (H, K, D), nnx.initializers.zeros)
        self.norm, self.config = head_norm(rngs, H, K, depth), config

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return TimeMixState.zeros(batch, *self.key.shape, dtype)

    def __call__(self, x, tokens: Tokens, state: TimeMixState | None = None):
        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        before, shift = token_before(x, tokens, past.shift)
        mixed = lambda name: toward(x, before, getattr(self, f"mix_{name}"))
        into = lambda name: wide(project(mixed(name), getattr(self, name), "BTD,DHK->BHTK"))
        r, k, v = into("receptance"), into("key"), into("value")
        v, traces = self.with_first(v, mixed("value"), tokens)
        decay = -math.exp(-0.5) * jax.nn.sigmoid(self.decay(mixed("decay"), jnp.tanh))
        rate = jax.nn.sigmoid(self.rate(mixed("rate"))) * (2 if self.config.negative else 1)
        gate = jnp.swapaxes(self.gate(mixed("gate"), jax.nn.sigmoid), 1, 2).astype(x.dtype)

        channel = lambda weight: weight[...][:, None, :]
        kk = k * channel(self.removal)
        kk = kk * jax.lax.rsqrt(jnp.maximum((kk * kk).sum(-1, keepdims=True), 1e-24))
        k = k * (1 + (rate - 1) * channel(self.replacement))
        y, memory = generalised_delta(r, k, v, -kk, rate * kk, decay, tokens, past.memory, self.config.form)
        own = (r * k * channel(self.bonus)).sum(-1, keepdims=True) * v
        y = (self.norm(jnp.swapaxes(y, 1, 2)) + jnp.swapaxes(own, 1, 2)).astype(x.dtype) * gate
        state = None if state is None else TimeMixState(shift, memory)
        return project(y, self.out, "BTHK,HKD->BTD"), state, Aux(traces=traces)

    def with_first(self, v, x, tokens: Tokens):
        """Values [B, H, T, K] mixed with those of the first layer, and the traces: in the first, its values."""
        B, H, T, K = v.shape
        if self.blend is None:
            return v, {"value": jnp.swapaxes(v, 1, 2).reshape(B, T, H * K).astype(x.dtype)}
        if FIRST not in tokens.provided:
            raise ValueError(f"RWKV7.value_rank = {self.blend.down.shape[1]}: wants the first layer's values, and no "
                             f"Provide({FIRST!r}, ...) around an RWKV7(value_rank=None) publishes them before it")
        first = jnp.swapaxes(tokens.provided[FIRST].reshape(B, T, H, K), 1, 2).astype(v.dtype)
        return v + (first - v) * jax.nn.sigmoid(self.blend(x)), {}


def bends(width: int, size: int):
    """-1 to 1 along the channels of every head, flat in the middle, [D]."""
    middle = (size - 1) / 2
    line = (jnp.arange(width) % size - middle) / max(middle, 1)
    return line * abs(line)


class ChannelMix7(LayerConfig):
    """The feed-forward layer: `relu(x_k W_key)^2 W_value`, where x_k is a mixture of the token and the one before.
    hidden: F."""

    hidden: int

    def __post_init__(self):
        require(self.hidden >= 1, self, "hidden", "must be at least 1")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "ChannelMix7Module":
        return ChannelMix7Module(self, rngs, at)


class ChannelMix7Module(Layer):
    """Weights: key [D, F], value [F, D]; mix_key [D]. State: the token before."""

    def __init__(self, config: ChannelMix7, rngs: nnx.Rngs, at: Place):
        D, F = at.width, config.hidden
        self.mix_key = parameter(rngs, "->D", (D,), given(1 - channels(D) ** Depth.of(at).falling**4))
        self.key = parameter(rngs, "D->F", (D, F), uniform(0.5 * D**-0.5))
        self.value = parameter(rngs, "F->D", (F, D), nnx.initializers.zeros)

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return ShiftState.zeros(batch, self.mix_key.shape[0], dtype)

    def __call__(self, x, tokens: Tokens, state: ShiftState | None = None):
        before, state = token_before(x, tokens, state)
        k = project(toward(x, before, self.mix_key), self.key, "BTD,DF->BTF")
        return project(jnp.square(jax.nn.relu(k)), self.value, "BTF,FD->BTD"), state, Aux()
