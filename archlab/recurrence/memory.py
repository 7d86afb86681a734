"""What all matrix-state recurrences share: the state, and the door through which their forms are called.

Such a recurrence keeps a matrix S [N, P] for every head: it writes the value v [P] at the key k [N], forgets by its own
rule, and reads y = q S. The rules are in scalar_decay, channel_decay, delta_rule and generalised_delta.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from archlab.layers.contract import Tokens, document_starts, pytree
from archlab.layers.sharding import free_axes, per_shard

# HIGHEST, because the dots of GPUs and TPUs would round the state.
dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

LEAST = -1e4  # of logarithms of decays: exp of it is 0, and it may be multiplied by 0 where -inf may not


@pytree
class MemoryState:
    """matrix [B, H, N, P]: S of each row's last document, at least float32. segment [B]: that document."""

    matrix: Float[Array, "B H N P"]
    segment: Int[Array, "B"]

    @classmethod
    def zeros(cls, batch: int, heads: int, keys: int, values: int, dtype) -> "MemoryState":
        dtype = jnp.promote_types(dtype, jnp.float32)
        return cls(jnp.zeros((batch, heads, keys, values), dtype), jnp.zeros((batch,), jnp.int32))


def remember(run: Callable, letters: str, q: Float[Array, "B G T N"], k: Float[Array, "B G T N"],
             v: Float[Array, "B H T P"], *rest: jax.Array, tokens: Tokens, state: MemoryState):
    """`run(q, k, v, *rest, starts, S) -> (y, S)`, on every device's own rows and heads, in the dtype of the state.

    letters: of `rest`, which must be such that zeros leave the state as it is: they are set to 0 at padding, and so are
      the keys. Head h reads and writes with the queries and keys of group h // (H / G).
    """
    G, H = q.shape[1], v.shape[1]
    if H % G:
        raise ValueError(f"{H} heads do not divide into {G} groups of queries and keys")
    starts, last = document_starts(tokens.segments, state.segment)
    hide = lambda a: jnp.where(tokens.real.reshape(tokens.real.shape[0], 1, -1, *[1] * (a.ndim - 3)), a, 0)
    k, *rest = (hide(a) if a.ndim > 2 else a for a in (k, *rest))
    if 1 < G < H and G % free_axes(jax.sharding.get_abstract_mesh()).get("tensor", 1):
        q, k = (jnp.repeat(a, H // G, axis=1) for a in (q, k))  # groups that do not divide over devices
    word = "BHTN" if q.shape[1] == H else "BGTN"
    arrays = [a.astype(state.matrix.dtype) for a in (q, k, v, *rest)]
    y, matrix = per_shard(run, f"{word} {word} BHTP {letters} BT BHNP", "BHTP BHNP")(*arrays, starts, state.matrix)
    return y, MemoryState(matrix, last)


def step_by_step(step: Callable, starts: Bool[Array, "B T"], S: Float[Array, "B H N P"], *steps: jax.Array):
    """The definition, as a scan: `step(S, *now) -> (S, y)` over arrays [B, H, T, ...]; S is zeroed where starts."""
    def run(S, now):
        start, *now = now
        return step(jnp.where(start[:, None, None, None], 0, S), *now)

    if starts.shape[1] == 1:
        S, y = run(S, [starts[:, 0], *(a[:, :, 0] for a in steps)])
        return y[:, :, None], S
    S, y = jax.lax.scan(run, S, [starts.T, *(jnp.moveaxis(a, 2, 0) for a in steps)])
    return jnp.moveaxis(y, 0, 2), S


def per_head(a: Float[Array, "B G T N"], heads: int) -> Float[Array, "B H T N"]:
    """Queries or keys of groups, repeated for each head of the group."""
    return jnp.repeat(a, heads // a.shape[1], axis=1)


# What the chunked forms share. They cut time T into C chunks of Q tokens: [B, H, T, ...] becomes [B, H, C, Q, ...].


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
    """A scan over chunks: `chunk(S, documents, *now) -> (S, y [B, H, Q, P])` over arrays [B, H, T, ...].

    `documents` has no axis C here; `chunk` may not close over traced arrays. The backward pass keeps the state before
    each chunk, and computes the rest again. Derivatives: reverse mode only.
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
