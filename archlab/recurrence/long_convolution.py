"""Causal convolutions as long as the text, by FFT, in which documents stay apart.

    y_t = sum_j h_j u_{t-j}    over the tokens of t's own document

One FFT does it where every row is one document. Where documents are packed, the row is halved, and halved again: what
the left half of a stretch adds to its right half is one FFT, in which only the document that lies across the middle
takes part. All pairs of tokens meet once: O(T log^2 T) time, O(T) memory. By halves, no output depends on a later token
or on another document, not by round-off either. Short pieces are summed pair by pair.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from archlab.layers.contract import Tokens, wide
from archlab.layers.sharding import per_shard
from archlab.recurrence.convolution import ConvState

DENSE = 32  # halves up to this length go by products of matrices, longer ones by FFT; pieces up to it by pairs
GROUP = 2**19  # numbers convolved at once


def long_convolution(u: Float[Array, "B T F"], h: Float[Array, "J F"], segments: Int[Array, "B T"]):
    """The convolution. h: taps, any number of them. Returns y [B, T, F], at least float32.

    The gradient keeps only the arguments.
    """
    T, u = u.shape[1], jnp.where((segments > 0)[:, :, None], wide(u), 0)
    h = jnp.pad(h[:T], ((0, max(0, T - h.shape[0])), (0, 0))).astype(u.dtype)
    return per_shard(_in_groups, "BTF TF BT", "BTF")(u, h, segments)


def _in_groups(u, h, segments):
    """Some channels at a time, so that spectra are small beside the text itself."""
    B, T, F = u.shape
    size = next(n for n in range(F, 0, -1) if F % n == 0 and (n * B * T <= GROUP or n == 1))
    if size == F:
        return _convolve(u, h, segments)
    cut = lambda a: jnp.moveaxis(a.reshape(*a.shape[:-1], F // size, size), -2, 0)
    y = jax.lax.map(lambda group: _convolve(*group, segments), (cut(u), cut(h)))
    return jnp.moveaxis(y, 0, 2).reshape(u.shape)


@jax.custom_vjp
def _convolve(u, h, segments):
    return _either(lambda form: form)(u, h, segments)


def _backward(arguments, dy):
    *arguments, segments = arguments
    gradient = lambda form: lambda u, h, segments, dy: jax.vjp(lambda u, h: form(u, h, segments), u, h)[1](dy)
    return *_either(gradient)(*arguments, segments, dy), None


_convolve.defvjp(lambda *arguments: (_convolve(*arguments), arguments), _backward)


def _either(of):
    """`of(form)`, with the form that suffices for the documents."""
    def run(u, h, segments, *rest):
        if u.shape[1] <= DENSE:
            return of(_by_pairs)(u, h, segments, *rest)
        single = ((segments == 0) | (segments == segments.max(1, keepdims=True))).all()
        return jax.lax.cond(single, of(_at_once), of(_by_halves), u, h, segments, *rest)

    return run


def _by_pairs(u, h, segments):
    place, same = jnp.arange(u.shape[1]), segments[:, :, None] == segments[:, None]
    lag = place[:, None] - place
    taps = jnp.where((lag >= 0)[:, :, None], h[jnp.maximum(lag, 0)], 0)
    return (taps * jnp.where(same[..., None], u[:, None], 0)).sum(2)


def _at_once(u, h, segments):
    u, h, T = jnp.moveaxis(u, 2, 0), h.T[:, None], u.shape[1]
    y = jnp.fft.irfft(jnp.fft.rfft(u, 2 * T) * jnp.fft.rfft(h, 2 * T), 2 * T)[..., :T]
    return jnp.moveaxis(y, 0, 2)


def _by_halves(u, h, segments):
    u, h, T = jnp.moveaxis(u, 2, 0), h.T, u.shape[1]  # channels first, for the products; time last, for the FFTs
    y, half = h[:, :1, None] * u, 1
    while half < T:
        y = y + _across_middles(u, _fit(h, 2 * half), segments, half)
        half *= 2
    return jnp.moveaxis(y, 0, 2)


def _across_middles(u: Float[Array, "F B T"], h: Float[Array, "F J"], segments: Int[Array, "B T"], half: int):
    """What the left half of each stretch of 2 `half` tokens adds to its right half. h: 2 `half` taps."""
    F, B, T = u.shape
    count = -(-(T - half) // (2 * half))  # stretches whose right half is not empty
    cut = lambda a: _fit(a, 2 * half * count).reshape(*a.shape[:-1], count, 2 * half)
    documents = cut(segments)
    across = documents == documents[..., half - 1:half]  # of the document that lies across the middle
    left = jnp.where(across[..., :half], cut(u)[..., :half], 0)
    if half <= DENSE:
        left = left.reshape(F, B * count, half)
        right = jnp.einsum("FBS,FST->FBT", left, _toeplitz(h), precision=jax.lax.Precision.HIGHEST)
        right = right.reshape(F, B, count, half)
    else:  # a circle of 2 half is enough: what comes round it falls into the left half, which is dropped
        product = jnp.fft.rfft(left, 2 * half) * jnp.fft.rfft(h, 2 * half)[:, None, None]
        right = jnp.fft.irfft(product, 2 * half)[..., half:]
    right = jnp.where(across[..., half:], right, 0)
    return _fit(jnp.pad(right, [(0, 0)] * 3 + [(half, 0)]).reshape(F, B, -1), T)


def _toeplitz(h: Float[Array, "F J"]) -> Float[Array, "F S T"]:
    """Entry [s, t] is h[half + t - s]: rows of one long line, each a step further behind."""
    half = h.shape[1] // 2
    line = jnp.tile(jnp.roll(h, -1, 1), (1, half))[:, :half * (2 * half - 1)]
    return line.reshape(-1, half, 2 * half - 1)[:, :, half - 1:]


def _fit(a, length: int):
    """The last axis cut or filled with zeros to this length."""
    return jnp.pad(a[..., :length], [(0, 0)] * (a.ndim - 1) + [(0, max(0, length - a.shape[-1]))])


def finite_convolution(u: Float[Array, "B T F"], h: Float[Array, "J F"], tokens: Tokens, state: ConvState | None):
    """A convolution with J taps that goes on from the last J - 1 inputs. Returns y [B, T, F], at least float32, and the
    state after the piece (None without one)."""
    if state is None:
        return long_convolution(u, h, tokens.segments), None
    kept, h = h.shape[0] - 1, wide(h)
    line = jnp.concatenate([state.inputs.astype(u.dtype), u], 1)
    segments = jnp.concatenate([state.segments, tokens.segments], 1)
    if u.shape[1] == 1:
        meet = jnp.where((segments == tokens.segments)[:, :, None], wide(line), 0)
        y = jnp.einsum("BJF,JF->BF", meet, h[::-1], precision=jax.lax.Precision.HIGHEST)[:, None]
    else:
        y = long_convolution(line, h, segments)[:, kept:]
    # Padding comes last, so the newest inputs end with the piece's real tokens.
    newest = tokens.real.sum(1)[:, None] + jnp.arange(kept)
    take = functools.partial(jnp.take_along_axis, axis=1)
    inputs = take(line, newest[:, :, None]).astype(state.inputs.dtype)
    return y, ConvState(inputs, take(segments, newest))
