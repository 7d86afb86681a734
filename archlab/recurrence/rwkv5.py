"""RWKV-5, Eagle: RWKV with a matrix for each head as its state, and a decay for each key channel that is learned.

Peng et al. 2024 (arXiv:2404.05892), section 4.1. With receptances r, keys k, values v and a bonus u,

    y_t = r_t (S_{t-1} + diag(u) k_t v_t^T)        S_t = diag(w) S_{t-1} + k_t v_t^T        w = exp(-exp(decay))

Then every head is normed, gated by a SiLU, and all are projected back. Initialisation as in the published code.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, wide
from archlab.recurrence.channel_decay import channel_decay
from archlab.recurrence.forms import Form
from archlab.recurrence.rwkv import (Depth, TimeMixState, channels, check_heads, given, head_norm, matrices, orthogonal,
                                     span, zigzag)
from archlab.recurrence.rwkv4 import ChannelMix4, ChannelMix4Module, mixed
from archlab.recurrence.shift import token_before


class RWKV5(LayerConfig):
    """The time mix. head_size: K; the heads fill the stream. form: of the recurrence; None to choose."""

    head_size: int = 64
    form: Form | None = None

    def __post_init__(self):
        require(self.head_size >= 1, self, "head_size", "must be at least 1")

    @property
    def recurrent(self) -> bool:
        return True

    def check(self, width: int) -> None:
        check_heads(self, width)

    def build(self, rngs: nnx.Rngs, at: Place) -> "RWKV5Module":
        return RWKV5Module(self, rngs, at)


class RWKV5Module(Layer):
    """Weights: receptance, key, value, gate [D, H, K] and out [H, K, D]; what each takes of the token and not of the
    one before, mix_receptance, mix_key, mix_value, mix_gate [D]; decay and bonus [H, K]; norm."""

    def __init__(self, config: RWKV5, rngs: nnx.Rngs, at: Place):
        D, K, depth = at.width, config.head_size, Depth.of(at)
        H, mix = D // K, lambda share: parameter(rngs, "->D", (D,), given(share))
        self.mix_receptance = mix(channels(D) ** (0.5 * depth.falling))
        self.mix_key = mix(channels(D) ** depth.falling)
        self.mix_value = mix(channels(D) ** depth.falling + 0.3 * depth.rising)
        self.mix_gate = mix(channels(D) ** (0.5 * depth.falling))
        self.receptance, self.value = (matrices(rngs, D, H, orthogonal()) for _ in range(2))
        self.key, self.gate = (matrices(rngs, D, H, orthogonal(0.1)) for _ in range(2))
        self.out = parameter(rngs, "HK->D", (H, K, D), nnx.initializers.zeros)
        self.decay = parameter(rngs, "->HK", (H, K), given(first_decay(D, depth)), rate=2.0)
        self.bonus = parameter(rngs, "->HK", (H, K), given(first_bonus(D, depth)))
        self.norm, self.form = head_norm(rngs, H, K, depth), config.form

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return TimeMixState.zeros(batch, *self.key.shape, dtype)

    def __call__(self, x, tokens: Tokens, state: TimeMixState | None = None):
        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        before, shift = token_before(x, tokens, past.shift)
        into = lambda share, weight: project(mixed(x, before, share), weight, "BTD,DHK->BHTK")
        r, k = into(self.mix_receptance, self.receptance), into(self.mix_key, self.key)
        v = into(self.mix_value, self.value)
        decay = jnp.broadcast_to(-jnp.exp(wide(self.decay[...]))[:, None, :], k.shape)
        y, memory = channel_decay(r, k, v, decay, tokens, past.memory, self.bonus[...], self.form)
        y = self.norm(jnp.swapaxes(y, 1, 2)).astype(x.dtype)
        y = y * jax.nn.silu(project(mixed(x, before, self.mix_gate), self.gate, "BTD,DHK->BTHK"))
        return project(y, self.out, "BTHK,HKD->BTD"), None if state is None else TimeMixState(shift, memory), Aux()


def first_decay(width: int, depth: Depth):
    """The decay of each channel at first, as ln(-ln w): slow in the first channels, fast in the last, [D]."""
    return -6 + 5 * span(width) ** (0.7 + 1.3 * depth.rising)


def first_bonus(width: int, depth: Depth):
    """The bonus of each channel at first, [D]."""
    return depth.rising * (1 - span(width)) + 0.1 * zigzag(width)


class ChannelMix5(ChannelMix4):
    """The feed-forward layer: that of RWKV-4, and smaller at first."""

    def build(self, rngs: nnx.Rngs, at: Place) -> "ChannelMix5Module":
        return ChannelMix5Module(self, rngs, at)


class ChannelMix5Module(ChannelMix4Module):
    def __init__(self, config: ChannelMix5, rngs: nnx.Rngs, at: Place):
        super().__init__(config, rngs, at)
        self.key = parameter(rngs, "D->F", self.key.shape, orthogonal())
