"""RWKV-4: a weighted average of all values so far, and a feed-forward layer that sees the token before.

Peng et al. 2023 (arXiv:2305.13048), section 3. With a decay w > 0 and a bonus u per channel,

    y_t = (sum_{i<t} e^{k_i - (t-1-i) w} v_i + e^{u + k_t} v_t) / (the same without v)

Numerator and denominator are held as multiples of e^{p_t}, p_t = max(p_{t-1} - w, k_t), so that no exponential
overflows (appendix D). Initialisation and learning rates as in the published code.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, document_starts, pytree, wide
from archlab.recurrence.diagonal import DiagonalState, diagonal
from archlab.recurrence.forms import Form
from archlab.recurrence.rwkv import Depth, channels, given, orthogonal, span, zigzag
from archlab.recurrence.shift import ShiftState, token_before

NEVER = -1e30  # the logarithm of what has not been: finite, so that differences of two are numbers


class RWKV4(LayerConfig):
    """The time mix. form: of the recurrence; None to choose."""

    form: Form | None = None

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "RWKV4Module":
        return RWKV4Module(self, rngs, at)


@pytree
class RWKV4State:
    """shift: the token before; sums: numerator and denominator [B, 2F] over e^peak; peak [B, F]: p."""

    shift: ShiftState
    sums: DiagonalState
    peak: Float[Array, "B F"]

    @classmethod
    def zeros(cls, batch: int, width: int, dtype) -> "RWKV4State":
        sums = DiagonalState.zeros(batch, 2 * width, dtype)
        peak = jnp.full((batch, width), NEVER, sums.hidden.dtype)
        return cls(ShiftState.zeros(batch, width, dtype), sums, peak)


class RWKV4Module(Layer):
    """Weights: key, value, receptance [D, F] and out [F, D] with F = D; what each takes of the token and not of the one
    before, mix_key, mix_value, mix_receptance [D]; decay [F], the logarithm of w, and bonus [F]."""

    def __init__(self, config: RWKV4, rngs: nnx.Rngs, at: Place):
        D, depth, zeros = at.width, Depth.of(at), nnx.initializers.zeros
        mix = lambda share: parameter(rngs, "->D", (D,), given(share))
        self.mix_key = mix(channels(D) ** depth.falling)
        self.mix_value = mix(channels(D) ** depth.falling + 0.3 * depth.rising)
        self.mix_receptance = mix(channels(D) ** (0.5 * depth.falling))
        self.key = parameter(rngs, "D->F", (D, D), zeros)
        self.value = parameter(rngs, "D->F", (D, D), orthogonal())
        self.receptance = parameter(rngs, "D->F", (D, D), zeros)
        self.out = parameter(rngs, "F->D", (D, D), zeros)
        self.decay = parameter(rngs, "->F", (D,), given(-5 + 8 * span(D) ** (0.7 + 1.3 * depth.rising)), rate=2.0)
        self.bonus = parameter(rngs, "->F", (D,), given(jnp.log(0.3) + 0.5 * zigzag(D)), rate=3.0)
        self.form = config.form

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return RWKV4State.zeros(batch, self.key.shape[0], dtype)

    def __call__(self, x, tokens: Tokens, state: RWKV4State | None = None):
        past = RWKV4State.zeros(x.shape[0], x.shape[2], x.dtype) if state is None else state
        before, shift = token_before(x, tokens, past.shift)
        k = project(mixed(x, before, self.mix_key), self.key, "BTD,DF->BTF")
        v = project(mixed(x, before, self.mix_value), self.value, "BTD,DF->BTF")
        r = project(mixed(x, before, self.mix_receptance), self.receptance, "BTD,DF->BTF")
        decay, bonus = jnp.exp(wide(self.decay[...])), wide(self.bonus[...])
        y, sums, peak = weighted_average(wide(k), wide(v), decay, bonus, tokens, past, self.form)
        y = project(jax.nn.sigmoid(r) * y.astype(x.dtype), self.out, "BTF,FD->BTD")
        return y, None if state is None else RWKV4State(shift, sums, peak), Aux()


def weighted_average(k: Float[Array, "B T F"], v: Float[Array, "B T F"], w: Float[Array, "F"], u: Float[Array, "F"],
                     tokens: Tokens, past: RWKV4State, form: Form | None = None):
    """y [B, T, F] as in the file's docstring, and `sums` and `peak` of the state after the piece."""
    starts, _ = document_starts(tokens.segments, past.sums.segment)
    starts = starts[:, :, None]
    # Nothing depends on p but the rounding: no gradient flows through it.
    line = jax.lax.stop_gradient(peaks(k, w, starts, past.peak))
    before, now = jnp.where(starts, NEVER, line[:, :-1]), line[:, 1:]
    keep, add = jnp.exp(before - w - now), jnp.exp(k - now)
    twice = lambda a, b: jnp.concatenate([a, b], -1)
    sums, state = diagonal(twice(keep, keep), twice(add * v, add), tokens, past.sums, form)

    earlier = jnp.concatenate([past.sums.hidden[:, None], sums[:, :-1]], 1)
    numerator, denominator = jnp.split(jnp.where(starts, 0, earlier), 2, axis=-1)
    top = jax.lax.stop_gradient(jnp.maximum(before, u + k))
    old, own = jnp.exp(before - top), jnp.exp(u + k - top)
    y = (old * numerator + own * v) / (old * denominator + own)
    newest = tokens.real.sum(1)[:, None, None]  # padding comes last
    return y, state, jnp.take_along_axis(line, newest, 1)[:, 0].astype(past.peak.dtype)


def peaks(k: Float[Array, "B T F"], w: Float[Array, "F"], starts: Bool[Array, "B T 1"], last: Float[Array, "B F"]):
    """p_0 = last, p_t = max(p_{t-1} - w, k_t), or k_t at the start of a document; [B, 1 + T, F]."""
    run = one_by_one if jax.default_backend() == "cpu" or k.shape[1] == 1 else doubling
    return run(k, w, starts, last.astype(k.dtype))


def one_by_one(k, w, starts, last):
    """Step by step: the definition."""
    def step(p, now):
        k, start = now
        p = jnp.where(start, k, jnp.maximum(p - w, k))
        return p, p

    _, p = jax.lax.scan(step, last, (jnp.swapaxes(k, 0, 1), jnp.swapaxes(starts, 0, 1)))
    return jnp.concatenate([last[:, None], jnp.swapaxes(p, 0, 1)], 1)


def doubling(k, w, starts, last):
    """In log2(T) steps, each of which doubles how far back is seen: a maximum does not mind what it sees twice."""
    line, places = jnp.concatenate([last[:, None], k], 1), jnp.arange(1 + k.shape[1])[:, None]
    begun = jax.lax.cummax(jnp.where(jnp.pad(starts, ((0, 0), (1, 0), (0, 0))), places, 0), axis=1)
    reach = 1
    while reach <= k.shape[1]:
        earlier = jnp.pad(line, ((0, 0), (reach, 0), (0, 0)))[:, :-reach] - reach * w
        line = jnp.where(places - begun >= reach, jnp.maximum(line, earlier), line)
        reach *= 2
    return line


def mixed(x: Float[Array, "B T D"], before: Float[Array, "B T D"], share: nnx.Param) -> Float[Array, "B T D"]:
    """The share [D] of the token itself, and what is left of the one before."""
    return before + share[...].astype(x.dtype) * (x - before)


class ChannelMix4(LayerConfig):
    """The feed-forward layer of RWKV-4 and RWKV-5: `sigmoid(x_r W_receptance) * (relu(x_k W_key)^2 W_value)`, where x_r
    and x_k are mixtures of the token and the one before. hidden: F."""

    hidden: int

    def __post_init__(self):
        require(self.hidden >= 1, self, "hidden", "must be at least 1")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "ChannelMix4Module":
        return ChannelMix4Module(self, rngs, at)


class ChannelMix4Module(Layer):
    """Weights: key [D, F], value [F, D], receptance [D, D]; mix_key, mix_receptance [D]. State: the token before."""

    def __init__(self, config: ChannelMix4, rngs: nnx.Rngs, at: Place):
        D, F, depth, zeros = at.width, config.hidden, Depth.of(at), nnx.initializers.zeros
        self.mix_key = parameter(rngs, "->D", (D,), given(channels(D) ** depth.falling))
        self.mix_receptance = parameter(rngs, "->D", (D,), given(channels(D) ** depth.falling))
        self.key = parameter(rngs, "D->F", (D, F), orthogonal(max(F / D, 1) ** 0.5))
        self.value = parameter(rngs, "F->D", (F, D), zeros)
        self.receptance = parameter(rngs, "D->.", (D, D), zeros)

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return ShiftState.zeros(batch, self.mix_key.shape[0], dtype)

    def __call__(self, x, tokens: Tokens, state: ShiftState | None = None):
        before, state = token_before(x, tokens, state)
        k = project(mixed(x, before, self.mix_key), self.key, "BTD,DF->BTF")
        r = project(mixed(x, before, self.mix_receptance), self.receptance, "BTD,DE->BTE")
        y = project(jnp.square(jax.nn.relu(k)), self.value, "BTF,FD->BTD")
        return jax.nn.sigmoid(r) * y, state, Aux()
