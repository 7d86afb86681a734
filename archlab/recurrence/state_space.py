"""State spaces that are the same at every token: a convolution over a piece, a recurrence at a step.

    x_t = A x_{t-1} + B u_t        y_t = 2 Re(C x_t)        y = K * u    with    K_t = 2 Re(C A^t B)

One system for every channel; x holds one mode of each conjugate pair. S4D (diagonal A) and S4 (diagonal plus rank one)
say how their powers are taken; what a piece does with them is here.
"""

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Complex, Float, Int

from archlab.layers.alphabet import parameter, project
from archlab.layers.contract import Aux, Layer, Place, Tokens, document_starts, pytree, wide
from archlab.recurrence.long_convolution import long_convolution

RATE = 0.1  # the learning rate of dt, A and B: 1e-3 beside 1e-2 in the published runs on the Long Range Arena


@pytree
class StateSpaceState:
    """hidden [B, F, N]: x of each row's last document, at least complex64. segment [B]: that document."""

    hidden: Complex[Array, "B F N"]
    segment: Int[Array, "B"]

    @classmethod
    def zeros(cls, batch: int, channels: int, modes: int, dtype) -> "StateSpaceState":
        hidden = jnp.zeros((batch, channels, modes), jnp.promote_types(dtype, jnp.complex64))
        return cls(hidden, jnp.zeros((batch,), jnp.int32))


class System(Protocol):
    """A discretised system, for pieces of at most some length."""

    def step(self, x: Complex[Array, "B F N"], u: Float[Array, "B F"]) -> Complex[Array, "B F N"]:
        """A x + B u."""

    def read(self, x: Complex[Array, "B F N"]) -> Float[Array, "B F"]:
        """2 Re(C x)."""

    def kernel(self, length: int) -> Float[Array, "T F"]:
        """K."""

    def respond(self, x: Complex[Array, "B F N"], length: int) -> Float[Array, "B T F"]:
        """What the state before a piece adds to its outputs: 2 Re(C A^(t+1) x)."""

    def advance(self, x: Complex[Array, "B F N"], steps: Int[Array, "B"]) -> Complex[Array, "B F N"]:
        """A^steps x."""

    def absorb(self, u: Float[Array, "B T F"]) -> Complex[Array, "B F N"]:
        """The state that a piece leaves: sum_t A^(T-1-t) B u_t."""


def run(system: System, u: Float[Array, "B T F"], tokens: Tokens, state: StateSpaceState | None):
    """The system over a piece. Returns y [B, T, F], at least float32, and the state after it (None without one).

    Memory: O(T) for each channel, and some sqrt(T) modes of each; no state of any token is kept.
    """
    u, T = wide(u), u.shape[1]
    if state is None:
        return long_convolution(u, system.kernel(T), tokens.segments), None
    starts, last = document_starts(tokens.segments, state.segment)
    over = starts.any(1)[:, None, None]  # whether the state's document ends in this piece
    if T == 1:
        stepped = system.step(jnp.where(over, 0, state.hidden), u[:, 0])
        hidden = jnp.where(tokens.real[:, :, None], stepped, state.hidden).astype(state.hidden.dtype)
        return system.read(hidden)[:, None], StateSpaceState(hidden, last)
    carried = tokens.real & (jnp.cumsum(starts, 1) == 0)
    y = long_convolution(u, system.kernel(T), tokens.segments)
    y = y + jnp.where(carried[:, :, None], system.respond(state.hidden, T), 0)
    # The last document's tokens, moved to the end: every row then has its newest input at the same place.
    place = jnp.arange(T) + (tokens.real.sum(1) - T)[:, None]
    own = (place >= 0) & (jnp.take_along_axis(tokens.segments, jnp.maximum(place, 0), 1) == last[:, None])
    newest = jnp.where(own[:, :, None], jnp.take_along_axis(u, jnp.maximum(place, 0)[:, :, None], 1), 0)
    kept = jnp.where(over, 0, system.advance(state.hidden, carried.sum(1)))
    return y, StateSpaceState((kept + system.absorb(newest)).astype(state.hidden.dtype), last)


def root(length: int) -> int:
    """A power of two near sqrt(length): T powers are the products of so many short and T / so many long ones."""
    return 2 ** ((length - 1).bit_length() // 2)


def log_uniform(low: float, high: float):
    """Initialiser: the logarithm of numbers spread evenly over the orders of magnitude from `low` to `high`."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))


def pairs(values) -> Float[Array, "... 2"]:
    """Complex numbers as pairs of real ones, which is how parameters hold them."""
    return jnp.stack([values.real, values.imag], -1).astype(jnp.float32)


def complex_normal(key, shape, dtype):
    """Initialiser: pairs of real numbers that stand for complex ones of variance 1."""
    return jax.random.normal(key, shape, dtype) * 0.5**0.5


def as_complex(pairs: nnx.Param | Float[Array, "... 2"]) -> Complex[Array, "..."]:
    """The complex numbers that are held as pairs."""
    values = wide(pairs[...])
    return jax.lax.complex(values[..., 0], values[..., 1])


class StateSpaceModule(Layer):
    """S4's layer: `GLU(W gelu(ssm(x) + skip x) + b)` (arXiv:2111.00396, section 3.4; the gate as published with the
    code). Weights: those of `ssm`; skip [D]; mix [D, 2, D], value and gate, and its bias [2, D]."""

    def __init__(self, ssm: nnx.Module, rngs: nnx.Rngs, at: Place):
        D = at.width
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -D**-0.5, D**-0.5)
        self.ssm = ssm
        self.skip = parameter(rngs, "->D", (D,), jax.random.normal, decay=True)
        self.mix = parameter(rngs, "D->.F", (D, 2, D), uniform)
        self.mix_bias = parameter(rngs, "->.F", (2, D), uniform)

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return self.ssm.init_state(batch, dtype)

    def __call__(self, x, tokens: Tokens, state: StateSpaceState | None = None):
        y, state = run(self.ssm.system(x.shape[1]), x, tokens, state)
        y = _activate(y, x, self.skip[...])
        return _gate(project(y, self.mix, "BTD,DCF->BTCF"), self.mix_bias[...]), state, Aux()


# What lies between products is cheap: the gradient takes it again, and a long text's memory is of its products alone.


@jax.checkpoint
def _activate(y, x, skip):
    return jax.nn.gelu(y + skip * wide(x), approximate=False).astype(x.dtype)


@jax.checkpoint
def _gate(y, bias):
    value, gate = jnp.moveaxis(y + bias.astype(y.dtype), 2, 0)
    return value * jax.nn.sigmoid(gate)
