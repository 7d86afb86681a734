"""Attention of blocks of queries to the few keys that a pattern names: work linear in time, in both passes.

A block is `pattern.block` places of one document, counted from the document's start, so that neither what else is in
the row nor where a piece was cut changes what a token sees. Blocks are met a few at a time: their keys are gathered,
and dropped when they are done. The gradient gathers them again; no more than one step's scores are ever held.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from archlab.attention.rules import Places
from archlab.layers.contract import wide

TOGETHER = 8  # blocks of queries in one step of the loop


class Pattern(Protocol):
    """Which keys are seen; hashable. Places are counted from the document's start."""

    block: int

    def columns(self, blocks: Int[Array, "B N"], layer: Int[Array, "1"]) -> Int[Array, "B N C"]:
        """The places that some query of each block may see, each once; below 0 for none."""

    def sees(self, queries: Int[Array, "B N T 1"], keys: Int[Array, "B N 1 C"]) -> Bool[Array, "B N T C"]:
        """Which of its block's columns a query sees, of those that are not later than itself."""

    def slot(self, places: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where in a cache the key of each place stands."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend_sparse(pattern: Pattern, slots: int | None, q: Float[Array, "B T G R K"], k: Float[Array, "B S G K"],
                  v: Float[Array, "B S G K"], queries: Places, layer: Int[Array, "1"]) -> Float[Array, "B T G R K"]:
    """softmax(q k^T / sqrt(K)) v over what the pattern lets each query see.

    Args: slots: how many of the keys are a cache's; the others are the queries' own, in their order. None: the cache
      holds the queries' own too. queries: padding last. layer: what a random pattern is drawn for.
    """
    firsts, count = _blocks(pattern, queries)

    def one(blocks, y):
        rows, index, seen = _look(pattern, slots, blocks, firsts, queries, layer)
        return _put(y, rows, attend_seen(take(q, rows), take(k, index), take(v, index), seen))

    return _loop(one, jnp.zeros_like(q), pattern, q.shape[1], count)


def _forward(pattern, slots, q, k, v, queries, layer):
    return attend_sparse(pattern, slots, q, k, v, queries, layer), (q, k, v, queries, layer)


def _backward(pattern, slots, saved, dy):
    q, k, v, queries, layer = saved
    firsts, count = _blocks(pattern, queries)

    def one(blocks, carry):
        dq, dk, dv = carry
        rows, index, seen = _look(pattern, slots, blocks, firsts, queries, layer)
        _, pull = jax.vjp(lambda *qkv: attend_seen(*qkv, seen), take(q, rows), take(k, index), take(v, index))
        dq_, dk_, dv_ = pull(take(dy, rows))
        return _put(dq, rows, dq_), _add(dk, index, dk_), _add(dv, index, dv_)

    zeros = jnp.zeros_like(q), jnp.zeros_like(wide(k)), jnp.zeros_like(wide(v))
    dq, dk, dv = _loop(one, zeros, pattern, q.shape[1], count)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


attend_sparse.defvjp(_forward, _backward)


def _blocks(pattern: Pattern, queries: Places) -> tuple[Int[Array, "B S"], Int[Array, ""]]:
    """The row at which each block begins, in order, and behind them the number of real tokens; and how many blocks the
    row with the most of them has."""
    segments, positions = queries
    T = segments.shape[1]
    real = segments > 0
    new = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    begins = real & (new | (positions % pattern.block == 0))
    total = real.sum(1, keepdims=True)
    rows = jnp.sort(jnp.where(begins, jnp.arange(T), total), 1)
    return jnp.concatenate([rows, jnp.repeat(total, TOGETHER, 1)], 1), begins.sum(1).max()


def _loop(one, carry, pattern: Pattern, T: int, count: Int[Array, ""]):
    """`carry = one((first, number), carry)` for all blocks, a number of them at once.

    First as many as one document of T tokens has: known when traced, so that the work is counted. There are more where
    a row holds several documents, or a piece begins within a block: those are met one by one.
    """
    sure = -(-T // pattern.block)
    number = min(TOGETHER, sure)
    steps = -(-sure // number)
    carry = jax.lax.fori_loop(0, steps, lambda i, carry: one((i * number, number), carry), carry)
    return jax.lax.fori_loop(steps * number, count, lambda i, carry: one((i, 1), carry), carry) if T > 1 else carry


def _look(pattern: Pattern, slots, blocks: tuple, firsts, queries: Places, layer):
    """Of some blocks: the rows of their queries (T: none) [B, N, T], which keys they look at [B, N, C], and which of
    them are seen [B, N, T, C]."""
    T, (first, number) = queries.positions.shape[1], blocks
    bounds = jax.lax.dynamic_slice_in_dim(firsts, first, number + 1, 1)
    first, end = bounds[:, :-1], bounds[:, 1:]
    place = jnp.take_along_axis(queries.positions, jnp.minimum(first, T - 1), 1)  # of each block's first query
    steps = jnp.arange(min(pattern.block, T))
    rows, places = first[..., None] + steps, place[..., None] + steps
    real = rows < end[..., None]

    columns = pattern.columns(place // pattern.block, layer)
    index = pattern.slot(jnp.maximum(columns, 0))
    if slots is not None:
        row = columns + (first - place)[..., None]  # in the piece, where the document began there or before it
        index = jnp.where(row >= 0, slots + row, index)
    query, key = places[..., None], columns[:, :, None]
    seen = real[..., None] & (key >= 0) & (key <= query) & pattern.sees(query, key)
    return jnp.where(real, rows, T), index, seen


def attend_seen(q: Float[Array, "B N T G R K"], k: Float[Array, "B N C G K"], v: Float[Array, "B N C G K"],
                seen: Bool[Array, "B N T C"]) -> Float[Array, "B N T G R K"]:
    """Attention within each of N blocks, with all its scores at once; what sees nothing gets 0."""
    dtype = wide(q).dtype
    q, k, v = q * q.shape[-1] ** -0.5, k.astype(q.dtype), v.astype(q.dtype)
    scores = jnp.einsum("BNTGRK,BNCGK->BNGRTC", q, k, preferred_element_type=dtype)
    scores = jnp.where(seen[:, :, None, None], scores, -jnp.inf)
    top = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(top))
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(dtype).tiny)
    out = jnp.einsum("BNGRTC,BNCGK->BNTGRK", weights.astype(q.dtype), v, preferred_element_type=dtype)
    return out.astype(q.dtype)


def take(a: Float[Array, "B S *X"], index: Int[Array, "B N C"]) -> Float[Array, "B N C *X"]:
    """What stands at each index of a row; past the end, what is last."""
    return jax.vmap(lambda a, index: a.at[index].get(mode="clip"))(a, index)


def _put(a, rows, value):
    return jax.vmap(lambda a, rows, value: a.at[rows].set(value.astype(a.dtype), mode="drop"))(a, rows, value)


def _add(a, index, value):
    return jax.vmap(lambda a, index, value: a.at[index].add(value.astype(a.dtype), mode="drop"))(a, index, value)
