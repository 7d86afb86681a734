"""The short causal depthwise convolution that precedes many recurrences."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.layers.alphabet import parameter
from archlab.layers.contract import Tokens, pytree
from archlab.layers.mlp import add_bias


@pytree
class ConvState:
    """The last W - 1 real inputs of each row and their documents: inputs [B, W-1, F], segments [B, W-1]."""

    inputs: Float[Array, "B W F"]
    segments: Int[Array, "B W"]


class CausalConv(nnx.Module):
    """`y_t = bias + sum_j weight[W - 1 - j] x_{t-j}` per channel, within the document. weight [W, F], its last row for
    the token itself, as in published checkpoints; bias [F] if wanted.

    Initialised as the framework of the published code does it: uniform within 1/sqrt(W).
    """

    def __init__(self, size: int, channels: int, rngs: nnx.Rngs, bias: bool = True):
        bound = size**-0.5
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        self.weight = parameter(rngs, "->.F", (size, channels), uniform, decay=True)
        self.bias = parameter(rngs, "->F", (channels,), uniform) if bias else None

    def init_state(self, batch: int, dtype) -> ConvState:
        size, channels = self.weight.shape
        return ConvState(jnp.zeros((batch, size - 1, channels), dtype), jnp.zeros((batch, size - 1), jnp.int32))

    def __call__(self, x: Float[Array, "B T F"], tokens: Tokens, state: ConvState | None = None):
        """Returns y [B, T, F] and the state after the piece (None without one)."""
        size = self.weight.shape[0]
        past = self.init_state(x.shape[0], x.dtype) if state is None else state
        inputs = jnp.concatenate([past.inputs.astype(x.dtype), x], 1)  # token t stands at t + size - 1
        segments = jnp.concatenate([past.segments, tokens.segments], 1)
        y = add_bias(_convolve(self.weight[...].astype(x.dtype), inputs, segments, tokens.segments), self.bias)
        if state is None:
            return y, None
        # Padding comes last, so the newest W - 1 inputs end with the piece's real tokens.
        newest = tokens.real.sum(1)[:, None] + jnp.arange(size - 1)
        kept = jnp.take_along_axis(inputs, newest[:, :, None], 1).astype(state.inputs.dtype)
        return y, ConvState(kept, jnp.take_along_axis(segments, newest, 1))


# The gradient is written by hand, because JAX's own would keep a masked copy of the inputs for every tap.


@jax.custom_vjp
def _convolve(weight: Float[Array, "W F"], inputs: Float[Array, "B S F"], before: Int[Array, "B S"],
              segments: Int[Array, "B T"]) -> Float[Array, "B T F"]:
    """Taps over inputs that begin W - 1 places before the first token; `before`: their documents, where `segments` are
    the tokens' own."""
    return sum(tap * jnp.where(same, inputs[:, at], 0) for tap, at, same in _taps(weight, before, segments))


def _taps(weight, before, segments):
    """For each tap: itself, the places of its inputs, and where these are of the token's document [B, T, 1]."""
    for i, tap in enumerate(weight):
        at = slice(i, i + segments.shape[1])
        yield tap, at, (before[:, at] == segments)[:, :, None]


def _forward(weight, inputs, before, segments):
    return _convolve(weight, inputs, before, segments), (weight, inputs, before, segments)


def _backward(kept, dy):
    weight, inputs, before, segments = kept
    dweight = [jnp.where(same, dy * inputs[:, at], 0).sum((0, 1)) for _, at, same in _taps(weight, before, segments)]
    edge = len(weight) - 1  # an input is met by the token at its own place and by `edge` tokens before that
    dy, segments = (jnp.pad(a, [(0, 0), (edge, edge)] + [(0, 0)] * (a.ndim - 2)) for a in (dy, segments))
    dinputs = sum(tap * jnp.where(same, dy[:, at], 0)
                  for tap, at, same in _taps(weight[::-1], segments, before))
    return jnp.stack(dweight), dinputs, None, None


_convolve.defvjp(_forward, _backward)
