"""Hyena: gates and convolutions as long as the text, whose taps a small network draws (Poli et al. 2023,
arXiv:2302.10866)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, pytree, wide
from archlab.layers.mlp import add_bias, residual_scale
from archlab.recurrence.convolution import CausalConv, ConvState
from archlab.recurrence.long_convolution import long_convolution


class Hyena(LayerConfig):
    """`x_0 * (h conv (x_1 * v))` for order 2; each further order gates and convolves once more.

    length: the longest text; the filters are drawn on it, and a shorter text meets their beginning. order: how many
    gates. conv: the width of the short convolution. filter_width, filter_depth: of the network that draws the filters,
    and how many layers lie between its first and its last. features: of a place, for that network: odd, the place and
    cosines and sines of (features - 1) / 2 waves. frequency: of its sine activations, at the start.

    Decoding: there is no recurrence. The state holds the inputs of every convolution so far, and a token costs as many
    products as there were tokens, for each channel and each of the order - 1 convolutions.
    """

    length: int = 2048
    order: int = 2
    conv: int = 3
    filter_width: int = 64
    filter_depth: int = 2
    features: int = 33
    frequency: float = 14.0

    def __post_init__(self):
        for field in ("length", "conv", "filter_width"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")
        require(self.order >= 2, self, "order", "must be at least 2: a gate before the convolution and one after it")
        require(self.filter_depth >= 0, self, "filter_depth", "must be at least 0")
        require(self.features >= 3 and self.features % 2 == 1, self, "features", "must be odd, and at least 3")
        require(self.frequency > 0, self, "frequency", "must be positive")

    @property
    def recurrent(self) -> bool:
        return False

    @property
    def longest(self) -> int:
        return self.length

    def build(self, rngs: nnx.Rngs, at: Place) -> "HyenaModule":
        return HyenaModule(self, rngs, at)


class HyenaFilter(nnx.Module):
    """The taps: a network with sines over features of the place, under a window that closes sooner for later channels.

    Weights: features [L, E]; first [E, W] and its bias; inner [W, W] each and its bias; last [W, O, F]; frequency [W],
    of all sines; deltas [O, F], fixed: how fast each window closes. O = order - 1 filters.
    """

    def __init__(self, config: Hyena, channels: int, rngs: nnx.Rngs):
        L, E, W, O = config.length, config.features, config.filter_width, config.order - 1
        own = lambda letters, shape, init, rate=1.0: parameter(rngs, letters, shape, init, decay=False, rate=rate)
        uniform = lambda n: lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -n**-0.5, n**-0.5)
        # 1e-5 beside 1e-3 of the network, whose rate is the run's own in the published models
        self.features = own("->..", (L, E), _features, 1e-2)
        self.first = own(".->.", (E, W), uniform(E))
        self.first_bias = own("->.", (W,), uniform(E))
        self.inner = nnx.List([own(".->.", (W, W), uniform(W)) for _ in range(config.filter_depth)])
        self.inner_bias = nnx.List([own("->.", (W,), uniform(W)) for _ in range(config.filter_depth)])
        self.last = own(".->.F", (W, O, channels), uniform(W))
        self.frequency = own("->.", (W,), nnx.initializers.constant(config.frequency))
        self.deltas = own("->.F", (O, channels), _deltas, 0)
        self.length = L

    def __call__(self, length: int) -> Float[Array, "J O F"]:
        """The first `length` taps, at least float32."""
        sine = lambda x: jnp.sin(wide(self.frequency[...]) * x)
        x = sine(project(wide(self.features[:length]), self.first, "JE,EW->JW") + self.first_bias[...])
        for weight, bias in zip(self.inner, self.inner_bias):
            x = sine(project(x, weight, "JW,WV->JV") + bias[...])
        time = jnp.arange(length, dtype=x.dtype) / max(self.length - 1, 1)
        window = jnp.exp(-time[:, None, None] * jnp.abs(wide(self.deltas[...])))
        return project(x, self.last, "JW,WOF->JOF") * window


@pytree
class HyenaState:
    """The whole text: short, the short convolution's inputs; inputs [B, S, O, F] of the long ones and the document of
    each [B, S], in slots in the order of writing; count [B], how many are written; taps [S, O, F], the filters."""

    short: ConvState
    inputs: Float[Array, "B S O F"]
    segments: Int[Array, "B S"]
    count: Int[Array, "B"]
    taps: Float[Array, "S O F"]


class HyenaModule(Layer):
    """Weights: into [D, (order + 1) D] and its bias; short, a `CausalConv`; filter; skip [O, D], how much of its input
    a convolution adds to its output; out [D, D] and its bias."""

    def __init__(self, config: Hyena, rngs: nnx.Rngs, at: Place):
        self.config = config
        D, parts = at.width, config.order + 1
        self.into = parameter(rngs, "D->F", (D, parts * D))
        self.into_bias = parameter(rngs, "->F", (parts * D,))
        self.short = CausalConv(config.conv, parts * D, rngs)
        self.filter = HyenaFilter(config, D, rngs)
        self.skip = parameter(rngs, "->.F", (config.order - 1, D), jax.random.normal)
        self.out = parameter(rngs, "F->D", (D, D), scale=residual_scale(at))
        self.out_bias = parameter(rngs, "->D", (D,))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        self._fits(max_length, "a state's max_length")
        slots = (batch, max_length)
        inputs = jnp.zeros((*slots, *self.skip.shape), dtype)
        return HyenaState(self.short.init_state(batch, dtype), inputs, jnp.zeros(slots, jnp.int32),
                          jnp.zeros((batch,), jnp.int32), self.filter(max_length))

    def __call__(self, x, tokens: Tokens, state: HyenaState | None = None):
        T, O = x.shape[1], self.config.order - 1
        self._fits(T, "a text")
        if state is not None and T > state.taps.shape[0]:
            raise ValueError(f"a piece of {T} tokens: the state was made for max_length = {state.taps.shape[0]}")
        u, short = self.short(add_bias(project(x, self.into, "BTD,DF->BTF"), self.into_bias), tokens,
                              None if state is None else state.short)
        *gates, v = jnp.split(u, O + 2, -1)
        # A step takes the taps that the state holds: to draw them again would cost more than to use them.
        taps = state.taps if state is not None and T == 1 else self.filter(T if state is None else len(state.taps))
        if state is not None:
            at = state.count[:, None] + jnp.arange(T)
            at = jnp.where(tokens.real, at, len(state.taps))  # padding is written nowhere
            rows = jnp.arange(len(x))[:, None]
            segments = state.segments.at[rows, at].set(tokens.segments, mode="drop")
            state = HyenaState(short, state.inputs, segments, state.count + tokens.real.sum(1, dtype=jnp.int32),
                               state.taps)
        for o, gate in enumerate(reversed(gates[1:])):
            v = v * gate
            skipped = self.skip[o].astype(x.dtype) * v
            if state is None:
                y = long_convolution(v, taps[:, o], tokens.segments)
            else:
                inputs = state.inputs.at[rows, at, o].set(v.astype(state.inputs.dtype), mode="drop")
                state = dataclasses.replace(state, inputs=inputs)
                y = _read(inputs[:, :, o], taps[:, o], at, tokens, state)
            v = y.astype(x.dtype) + skipped
        return add_bias(project(v * gates[0], self.out, "BTF,FD->BTD"), self.out_bias), state, Aux()

    def _fits(self, length: int, what: str) -> None:
        if length > self.config.length:
            raise ValueError(f"{what} of {length} tokens is longer than Hyena.length = {self.config.length}, on which "
                             "the filters are drawn")


def _read(inputs: Float[Array, "B S F"], taps: Float[Array, "S F"], at: Int[Array, "B T"], tokens: Tokens,
          state: HyenaState):
    """The convolution's outputs [B, T, F] for the tokens in slots `at`."""
    slots = inputs.shape[1]
    if at.shape[1] > 1:
        y = long_convolution(inputs, taps, state.segments)
        return jnp.take_along_axis(y, jnp.minimum(at, slots - 1)[:, :, None], 1)
    own = jnp.where((state.segments == tokens.segments)[:, :, None], wide(inputs), 0)
    behind = jnp.concatenate([taps[::-1], jnp.zeros_like(taps)])  # slot s is met by tap `at - s`
    met = jax.vmap(lambda at: jax.lax.dynamic_slice_in_dim(behind, slots - 1 - at, slots))(at[:, 0])
    return jnp.einsum("BSF,BSF->BF", own, met.astype(own.dtype), precision=jax.lax.Precision.HIGHEST)[:, None]


def _features(key, shape, dtype):
    """Of each place: itself in [0, 1], and the real and imaginary parts of waves exp(-i f w)."""
    length, bands = shape[0], (shape[1] - 1) // 2
    place = jnp.arange(length, dtype=dtype)
    turn = 2 * jnp.pi * place[:, None] / length * jnp.linspace(1e-4, bands - 1, bands, dtype=dtype)
    return jnp.concatenate([place[:, None] / max(length - 1, 1), jnp.cos(turn), -jnp.sin(turn)], -1)


def _deltas(key, shape, dtype, target: float = 1e-2, slow: float = 1.5, fast: float = 0.3):
    """Windows that have closed to `target` after `slow` to `fast` times the whole length, from channel to channel."""
    rates = jnp.linspace(math.log(target) / slow, math.log(target) / fast, math.prod(shape), dtype=dtype)
    return rates.reshape(shape[::-1]).T
