"""What the chunked forms of matrix states share: time T in C chunks of Q tokens, and a scan over them.

Arrays [B, H, T, ...] become [B, H, C, Q, ...]; where a chunk is at hand, they are [B, H, Q, ...].
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from archlab.recurrence.memory import dot

LEAST = -1e4  # of logarithms of decays: exp of it is 0, and it may be multiplied by 0 where -inf may not


def chunk_length(length: int, size: int) -> int:
    """Q for a piece of `length` tokens: at most about `size`, such that little is padded."""
    chunks = -(-length // size)
    return min(length, size, -8 * (length // -(8 * chunks)))  # the mean, rounded up to whole vector registers


def cut(a: Float[Array, "B H T ..."], size: int) -> Float[Array, "B H C Q ..."]:
    """In chunks of `size` tokens, zeros behind the end: they leave the state as it is, like padding."""
    a = jnp.pad(a, [(0, -a.shape[2] % size if axis == 2 else 0) for axis in range(a.ndim)])
    return a.reshape(*a.shape[:2], -1, size, *a.shape[3:])


def join(a: Float[Array, "B H C Q ..."], length: int) -> Float[Array, "B H T ..."]:
    """`cut` undone."""
    return a.reshape(*a.shape[:2], -1, *a.shape[4:])[:, :, :length]


class Documents(NamedTuple):
    """Which tokens of a chunk meet; all bool, with a place for H.

    together [B, 1, C, Q, Q]: the two are of one document. with_before [B, 1, C, Q]: the token is of the document of the
    state before the chunk; with_after [B, 1, C, Q]: of that of the state behind it. through [B, 1, C]: the state before
    the chunk and that behind it are of one document.
    """

    together: Bool[Array, "B 1 C Q Q"]
    with_before: Bool[Array, "B 1 C Q"]
    with_after: Bool[Array, "B 1 C Q"]
    through: Bool[Array, "B 1 C"]


def documents_of(starts: Bool[Array, "B T"], size: int) -> Documents:
    """The documents of chunks of `size` tokens."""
    number = jnp.cumsum(jnp.pad(starts, ((0, 0), (0, -starts.shape[1] % size))), 1)
    number = number.reshape(starts.shape[0], 1, -1, size)
    after = number[..., -1:]
    before = jnp.pad(after[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))  # 0: the document of the state
    return Documents(number[..., :, None] == number[..., None, :], number == before, number == after,
                     (before == after)[..., 0])


def sums_between(g: Float[Array, "... Q"]) -> Float[Array, "... Q Q"]:
    """At [t, s]: the sum of g over s < r <= t, 0 where there is none.

    A product with a table of 0 and 1, because differences of running sums would lose digits after a strong decay.
    """
    Q = g.shape[-1]
    t, s, r = np.ogrid[:Q, :Q, :Q]
    table = ((s < r) & (r <= t)).reshape(Q * Q, Q).astype(g.dtype)
    return dot("...r,xr->...x", jnp.maximum(g, LEAST), table).reshape(*g.shape, Q)


def decays(g: Float[Array, "B H Q"], documents: Documents):
    """What one number per token leaves, within a chunk: of what s has written, to t; and of the state before.

    Returns: within [B, H, Q, Q] at [t, s], 0 where s > t and across documents; before [B, H, Q] at t.
    """
    within = jnp.where(jnp.tril(documents.together), sums_between(g), -jnp.inf)
    before = jnp.where(documents.with_before, jnp.cumsum(jnp.maximum(g, LEAST), -1), -jnp.inf)
    return jnp.exp(within), jnp.exp(before)


def chunk_by_chunk(chunk: Callable, size: int, starts: Bool[Array, "B T"], S: Float[Array, "B H N P"],
                   *arrays: jax.Array):
    """A scan over chunks of about `size` tokens.

    Args:
      chunk: `chunk(S, documents, *now) -> (S, y)`: from the state S [B, H, N, P] before a chunk to that behind it, and
        y [B, H, Q, P]. documents: its `Documents`, without axis C; now: its part of `arrays`, [B, H, Q, ...]. It may
        not close over traced arrays.
      starts: where the state is forgotten before the token. S: before the piece. arrays: [B, H, T, ...], or of groups
        of the heads; where they are zero, `chunk` must leave the state as it is.
    Returns: y [B, H, T, P], and the state [B, H, N, P] after the piece.

    The backward pass keeps the state before each chunk, and computes the rest again. Derivatives: reverse mode only.
    """
    length = starts.shape[1]
    size = chunk_length(length, size)
    y, S = _walk(chunk, S, documents_of(starts, size), tuple(cut(a, size) for a in arrays))
    return join(y, length), S


# The gradient is written by hand so that chunks are taken from and put into arrays in place: those that `lax.scan`
# walks over are copied with C in front, which takes a third of the time.


def _take(arrays, i):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, 2, keepdims=False), arrays)


def _put(arrays, now, i):
    return jax.tree.map(lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, i, 2), arrays, now)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(chunk, S, documents, arrays):
    return _forward(chunk, S, documents, arrays)[0]


def _forward(chunk, S, documents, arrays):
    chunks, size = documents.with_before.shape[2:]

    def run(carry, i):
        S, y = carry
        after, now = chunk(S, *_take((documents, *arrays), i))
        return (after, _put(y, now, i)), S

    y = jnp.zeros((*S.shape[:2], chunks, size, S.shape[3]), S.dtype)
    (S, y), before = jax.lax.scan(run, (S, y), jnp.arange(chunks))
    return (y, S), (before, documents, arrays)


def _backward(chunk, kept, gradients):
    before, documents, arrays = kept
    dy, dS = gradients
    only_floats = lambda arrays: tuple(a if jnp.issubdtype(a.dtype, jnp.floating) else None for a in arrays)

    def run(carry, now):
        dS, d = carry
        i, S = now
        at = _take(documents, i)
        _, back = jax.vjp(lambda S, *now: chunk(S, at, *now), S, *_take(arrays, i))
        dS, *now = back((dS, _take(dy, i)))
        return (dS, _put(d, only_floats(now), i)), None

    d = jax.tree.map(jnp.zeros_like, only_floats(arrays))
    (dS, d), _ = jax.lax.scan(run, (dS, d), (jnp.arange(len(before)), before), reverse=True)
    return dS, None, d


_walk.defvjp(_forward, _backward)
