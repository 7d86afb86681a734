"""Diagonal recurrences: every channel is a leaky sum of its own.

    h_t = a_t h_{t-1} + b_t

S5 (Smith et al. 2022, arXiv:2208.04933), RG-LRU (De et al. 2024, arXiv:2402.19427), minGRU (arXiv:2410.01201), RWKV-4
(arXiv:2305.13048). Real or complex.

The gradient is written by hand. With G_t that of h_t through all that comes after it, it is the recurrence itself,
backward in time, and needs nothing to be kept but a and h, which are there anyway:

    G_t = dh_t + a_{t+1} G_{t+1}        db_t = G_t        da_t = G_t h_{t-1}
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from archlab.layers.contract import Tokens, document_starts, pytree
from archlab.layers.sharding import per_shard
from archlab.recurrence.forms import Associative, Chunked, Form, Kernel, Sequential, check_form
from archlab.recurrence.kernels.diagonal import diagonal_kernel, fits
from archlab.recurrence.shapes import check_shapes


@pytree
class DiagonalState:
    """hidden [B, F]: h of each row's last document, at least float32. segment [B]: that document."""

    hidden: Inexact[Array, "B F"]
    segment: Int[Array, "B"]

    @classmethod
    def zeros(cls, batch: int, channels: int, dtype) -> "DiagonalState":
        """dtype: complex for a complex state; float32 at least."""
        dtype = jnp.promote_types(dtype, jnp.float32)
        return cls(jnp.zeros((batch, channels), dtype), jnp.zeros((batch,), jnp.int32))


def diagonal(a: Inexact[Array, "B T F"], b: Inexact[Array, "B T F"], tokens: Tokens, state: DiagonalState,
             form: Form | None = None):
    """The recurrence over a piece.

    Args: a: decays, of size at most 1; b: what is added. Both are without effect at padding.
    Returns: h [B, T, F] in the dtype of the state, and the state after the piece.

    Derivatives: reverse mode only, but for `Sequential()`. ValueError for arguments that do not fit together, and for
    `Kernel` where the state is complex, or where there is no GPU or TPU and it is not interpreted.
    """
    check_shapes("BT BF BTF BTF", tokens=tokens.segments, state=getattr(state, "hidden", state), a=a, b=b)
    starts, last = document_starts(tokens.segments, state.segment)
    real = tokens.real[:, :, None]
    a = jnp.where(starts[:, :, None], 0, jnp.where(real, a, 1)).astype(state.hidden.dtype)
    b = jnp.where(real, b, 0).astype(state.hidden.dtype)
    h, hidden = per_shard(choose(form, a.shape[1], a.dtype), "BTF BTF BF", "BTF BF")(a, b, state.hidden)
    return h, DiagonalState(hidden, last)


def choose(form: Form | None, length: int, dtype):
    """The function that computes a form. On a CPU, single steps in place beat every tree of products. ValueError as
    `diagonal` says."""
    if form is None:
        form = Kernel(256) if fits(dtype) else Chunked(1) if jax.default_backend() == "cpu" else Associative()
    real = not jnp.issubdtype(dtype, jnp.complexfloating)
    check_form(form, f"{'real' if real else 'complex'} diagonal states", Sequential, Associative, Chunked,
               *[Kernel] * real)
    if length == 1 or isinstance(form, Sequential):
        return sequential
    if isinstance(form, Kernel):
        return functools.partial(diagonal_kernel, size=form.size, interpret=form.interpret)
    return functools.partial(in_place, size=length if isinstance(form, Associative) else min(form.size, length))


def sequential(a, b, h):
    """Step by step: the definition."""
    def step(h, now):
        h = now[0] * h + now[1]
        return h, h

    if a.shape[1] == 1:
        h, _ = step(h, (a[:, 0], b[:, 0]))
        return h[:, None], h
    last, h = jax.lax.scan(step, h, (jnp.swapaxes(a, 0, 1), jnp.swapaxes(b, 0, 1)))
    return jnp.swapaxes(h, 0, 1), last


def in_place(a, b, h, size: int):
    """`size` steps at once, by `lax.associative_scan`, written to where they belong: no array is transposed or kept."""
    length = a.shape[1]
    pad = [(0, 0), (0, -length % size), (0, 0)]
    h, last = _chunks(jnp.pad(a, pad, constant_values=1), jnp.pad(b, pad), h, size)
    return h[:, :length], last


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunks(a, b, h, size):
    def run(i, carry):
        h, out = carry
        decay, new = _together(_cut(a, i, size), _cut(b, i, size))
        new = decay * h[:, None] + new
        return new[:, -1], jax.lax.dynamic_update_slice_in_dim(out, new, i * size, 1)

    last, out = jax.lax.fori_loop(0, a.shape[1] // size, run, (h, jnp.zeros_like(b)))
    return out, last


def _forward(a, b, h, size):
    out, last = _chunks(a, b, h, size)
    return (out, last), (a, h, out)


def _backward(size, kept, gradients):
    a, first, h = kept
    dh, g = gradients
    chunks = a.shape[1] // size

    def run(i, carry):  # g is the gradient of the state between this chunk and the next
        g, da, db = carry
        i = chunks - 1 - i
        now = _cut(a, i, size)
        decay, G = _together(jnp.pad(now[:, 1:], [(0, 0), (0, 1), (0, 0)], constant_values=1), _cut(dh, i, size), True)
        G = decay * g[:, None] + G
        before = jnp.where(i == 0, first, jax.lax.dynamic_index_in_dim(h, jnp.maximum(i * size - 1, 0), 1, False))
        before = jnp.concatenate([before[:, None], _cut(h, i, size)[:, :-1]], 1)
        put = lambda out, new: jax.lax.dynamic_update_slice_in_dim(out, new, i * size, 1)
        return now[:, 0] * G[:, 0], put(da, G * before), put(db, G)

    g, da, db = jax.lax.fori_loop(0, chunks, run, (g, jnp.zeros_like(a), jnp.zeros_like(a)))
    return da, db, g


_chunks.defvjp(_forward, _backward)


def _cut(array, index, size):
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, 1)


def _together(a, b, reverse: bool = False):
    """All steps of a chunk: what each makes of the state before the chunk (a factor), and what it adds."""
    def join(one, two):
        return two[0] * one[0], two[0] * one[1] + two[1]

    return jax.lax.associative_scan(join, (a, b), reverse=reverse, axis=1)
