"""RWKV-6, Finch: RWKV-5 whose decays, and whose mixtures with the token before, depend on the token.

Peng et al. 2024 (arXiv:2404.05892), section 4.2. For i among decay, key, value, receptance and gate,

    x_i = x_t + (x_{t-1} - x_t) * (mix_i + tanh(x_b down) up_i)        x_b = x_t + (x_{t-1} - x_t) * mix_base
    w_t = exp(-exp(decay + tanh(x_decay down) up))

Initialisation as in the published code.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens
from archlab.recurrence.channel_decay import channel_decay
from archlab.recurrence.forms import Form
from archlab.recurrence.rwkv import (Depth, LowRank, TimeMixState, channels, check_heads, given, head_norm, matrices,
                                     orthogonal, uniform)
from archlab.recurrence.rwkv5 import first_bonus, first_decay
from archlab.recurrence.shift import ShiftState, token_before

TARGETS = ("decay", "key", "value", "receptance", "gate")  # in the order of `mix_up`


class RWKV6(LayerConfig):
    """The time mix. head_size: K; the heads fill the stream. mix_rank, decay_rank: of the maps from a token to its
    mixtures (each of five) and to its decays. form: of the recurrence; None to choose."""

    head_size: int = 64
    mix_rank: int = 32
    decay_rank: int = 64
    form: Form | None = None

    def __post_init__(self):
        for field in ("head_size", "mix_rank", "decay_rank"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")

    @property
    def recurrent(self) -> bool:
        return True

    def check(self, width: int) -> None:
        check_heads(self, width)

    def build(self, rngs: nnx.Rngs, at: Place) -> "RWKV6Module":
        return RWKV6Module(self, rngs, at)


class RWKV6Module(Layer):
    """Weights: receptance, key, value, gate [D, H, K] and out [H, K, D]; what each takes of the token before, mix_base
    and mix_decay, mix_key, mix_value, mix_receptance, mix_gate [D]; mix_down [D, 5R], mix_up [5, R, D]; decay, a
    `LowRank`; bonus [H, K]; norm."""

    def __init__(self, config: RWKV6, rngs: nnx.Rngs, at: Place):
        D, K, R, depth = at.width, config.head_size, config.mix_rank, Depth.of(at)
        H, mix = D // K, lambda share: parameter(rngs, "->D", (D,), given(1 - share))
        for name in ("base", "decay", "key"):
            setattr(self, f"mix_{name}", mix(channels(D) ** depth.falling))
        self.mix_value = mix(channels(D) ** depth.falling + 0.3 * depth.rising)
        self.mix_receptance = mix(channels(D) ** (0.5 * depth.falling))
        self.mix_gate = mix(channels(D) ** (0.5 * depth.falling))
        # As published, no weight decay touches low-rank maps.
        self.mix_down = parameter(rngs, "D->.", (D, len(TARGETS) * R), nnx.initializers.zeros, decay=False)
        self.mix_up = parameter(rngs, "..->D", (len(TARGETS), R, D), uniform(0.01), decay=False)
        self.decay = LowRank(rngs, D, config.decay_rank, H, uniform(0.01), first_decay(D, depth), rate=2.0)
        self.bonus = parameter(rngs, "->HK", (H, K), given(first_bonus(D, depth)))
        self.receptance, self.value = (matrices(rngs, D, H, orthogonal()) for _ in range(2))
        self.key, self.gate = (matrices(rngs, D, H, orthogonal(0.1)) for _ in range(2))
        self.out = parameter(rngs, "HK->D", (H, K, D), nnx.initializers.zeros)
        self.norm, self.form = head_norm(rngs, H, K, depth), config.form

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return TimeMixState.zeros(batch, *self.key.shape, dtype)

    def __call__(self, x, tokens: Tokens, state: TimeMixState | None = None):
        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        before, shift = token_before(x, tokens, past.shift)
        mixed = self.mixtures(x, before)
        into = lambda name: project(mixed[name], getattr(self, name), "BTD,DHK->BHTK")
        r, k, v = into("receptance"), into("key"), into("value")
        decay = -jnp.exp(self.decay(mixed["decay"], jnp.tanh))
        y, memory = channel_decay(r, k, v, decay, tokens, past.memory, self.bonus[...], self.form)
        y = self.norm(jnp.swapaxes(y, 1, 2)).astype(x.dtype)
        y = y * jax.nn.silu(project(mixed["gate"], self.gate, "BTD,DHK->BTHK"))
        return project(y, self.out, "BTHK,HKD->BTD"), None if state is None else TimeMixState(shift, memory), Aux()

    def mixtures(self, x: Float[Array, "B T D"], before: Float[Array, "B T D"]) -> dict[str, Float[Array, "B T D"]]:
        """What each of `TARGETS` gets of a token and the one before."""
        base = project(toward(x, before, self.mix_base), self.mix_down, "BTD,DR->BTR")
        base = jnp.tanh(base).reshape(*base.shape[:2], len(TARGETS), -1)
        own = project(base, self.mix_up, "BTMR,MRD->MBTD")
        shares = (getattr(self, f"mix_{name}")[...].astype(x.dtype) for name in TARGETS)
        return {name: x + (before - x) * (share + more) for name, share, more in zip(TARGETS, shares, own)}


def toward(x: Float[Array, "B T D"], before: Float[Array, "B T D"], share: nnx.Param) -> Float[Array, "B T D"]:
    """The share [D] of the token before, and what is left of the token itself."""
    return x + share[...].astype(x.dtype) * (before - x)


class ChannelMix6(LayerConfig):
    """The feed-forward layer: `sigmoid(x_r W_receptance) * (relu(x_k W_key)^2 W_value)`, where x_r and x_k are mixtures
    of the token and the one before. hidden: F."""

    hidden: int

    def __post_init__(self):
        require(self.hidden >= 1, self, "hidden", "must be at least 1")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "ChannelMix6Module":
        return ChannelMix6Module(self, rngs, at)


class ChannelMix6Module(Layer):
    """Weights: key [D, F], value [F, D], receptance [D, D]; mix_key, mix_receptance [D]. State: the token before."""

    def __init__(self, config: ChannelMix6, rngs: nnx.Rngs, at: Place):
        D, F, depth, zeros = at.width, config.hidden, Depth.of(at), nnx.initializers.zeros
        self.mix_key = parameter(rngs, "->D", (D,), given(1 - channels(D) ** depth.falling))
        self.mix_receptance = parameter(rngs, "->D", (D,), given(1 - channels(D) ** depth.falling))
        self.key = parameter(rngs, "D->F", (D, F), orthogonal())
        self.value = parameter(rngs, "F->D", (F, D), zeros)
        self.receptance = parameter(rngs, "D->.", (D, D), zeros)

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return ShiftState.zeros(batch, self.mix_key.shape[0], dtype)

    def __call__(self, x, tokens: Tokens, state: ShiftState | None = None):
        before, state = token_before(x, tokens, state)
        k = project(toward(x, before, self.mix_key), self.key, "BTD,DF->BTF")
        r = project(toward(x, before, self.mix_receptance), self.receptance, "BTD,DE->BTE")
        y = project(jnp.square(jax.nn.relu(k)), self.value, "BTF,FD->BTD")
        return jax.nn.sigmoid(r) * y, state, Aux()
