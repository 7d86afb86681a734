"""Attention by blocks of queries, with its gradient: exact, and no more than a block's scores is held at a time.

As in FlashAttention (Dao et al. 2022, arXiv:2205.14135; the gradient is in its appendix B.2) the forward pass keeps of
the scores only the logarithm of each row's sum of exponentials, from which the backward pass has the weights again. A
block meets all its keys at once, since a CPU's cache holds its scores: nothing is rescaled on the way.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from archlab.attention.masks import visible
from archlab.layers.contract import wide

BLOCK = 128  # queries in a block: its scores stay in the second-level cache
GROUPS = 8  # stretches into which long texts are cut: the work done in vain, behind the mask, is 1/GROUPS of the rest


class Places(NamedTuple):
    """Segments and positions [B, T] of some tokens, as in `Tokens`."""

    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend_blocks(q: Float[Array, "B H T K"], k: Float[Array, "B G S K"], v: Float[Array, "B G S K"], queries: Places,
                  keys: Places, window: int | None = None, ordered: bool = True,
                  block: int = BLOCK) -> Float[Array, "B H T K"]:
    """softmax(q k^T / sqrt(K)) v of what is visible; rows that see nothing give 0. G divides H.

    Args: ordered: the keys stand in order and end with the queries' own, so that later ones, and with a window earlier
      ones, need not be computed. A cache's slots are not ordered: all are looked at.
    """
    return _forward(q, k, v, queries, keys, window, ordered, block)[0]


def _forward(q, k, v, queries, keys, window, ordered, block):
    B, H, T, K = q.shape
    grouped = (q * K**-0.5).reshape(B, k.shape[1], -1, T, K)

    def one(carry, rows, columns):
        y, total = carry
        scores = _scores(grouped, k, queries, keys, window, rows, columns)
        top = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(scores.dtype).min)
        weights = jnp.exp(scores - top)
        sums = jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(scores.dtype).tiny)
        out = _mix(weights.astype(v.dtype), _cut(v, columns, 2)) / sums.astype(v.dtype)
        return _put(y, out, rows, 3), _put(total, (top + jnp.log(sums))[..., 0], rows, 3)

    carry = jnp.zeros_like(grouped), jnp.zeros(grouped.shape[:-1], wide(q).dtype)
    y, total = _fold(one, carry, T, k.shape[2], window, ordered, block)
    y = y.reshape(q.shape)
    return y, (q, k, v, queries, keys, y, total)


def _backward(window, ordered, block, saved, dy):
    q, k, v, queries, keys, y, total = saved
    T, S, scale = q.shape[2], k.shape[2], q.shape[-1] ** -0.5
    q, y, dy = (a.reshape(total.shape + (-1,)) for a in (q * scale, y, dy))
    inner = (wide(y) * dy).sum(-1)  # sum over keys of weight times its gradient

    def one(carry, rows, columns):
        dq, dk, dv = carry
        weights = jnp.exp(_scores(q, k, queries, keys, window, rows, columns) - _cut(total, rows, 3)[..., None])
        dy_, k_, v_ = _cut(dy, rows, 3), _cut(k, columns, 2), _cut(v, columns, 2)
        dscores = weights * (_match(dy_, v_) - _cut(inner, rows, 3)[..., None])
        dscores = dscores.astype(q.dtype)
        add = lambda total, a, b: _put(total, _cut(total, columns, 2) + _gather(a, b), columns, 2)
        return (_put(dq, scale * _mix(dscores, k_), rows, 3), add(dk, dscores, _cut(q, rows, 3)),
                add(dv, weights.astype(v.dtype), dy_))

    zeros = jnp.zeros_like(q), jnp.zeros_like(wide(k)), jnp.zeros_like(wide(v))
    dq, dk, dv = _fold(one, zeros, T, S, window, ordered, block)
    return dq.reshape(dq.shape[0], -1, *dq.shape[3:]), dk.astype(k.dtype), dv.astype(v.dtype), None, None


attend_blocks.defvjp(_forward, _backward)


def _fold(one, carry, T: int, S: int, window, ordered: bool, block: int):
    """`carry = one(carry, rows, columns)` for each block of queries and the stretch of keys that it may see; each of
    the two is (first, count).

    Blocks of a short text are unrolled, each with the keys up to its end. Long texts are cut into `GROUPS` loops, each
    with the keys up to the loop's end: in a loop, unlike an unrolled program, one block's scores are dead before the
    next's are made. The order of the loops is fixed by what they carry.
    """
    whole = T // block
    each = max(1, -(-whole // GROUPS))
    groups = [(i * block, min(each, whole - i), block) for i in range(0, whole, each)]
    if T % block:
        groups.append((whole * block, 1, T % block))
    before = S - T  # keys older than the first query
    sliding = ordered and window is not None
    for start, blocks, size in groups:
        count = before + start + blocks * size if ordered else S
        if sliding:
            count = min(count, window - 1 + size)

        def step(i, carry, start=start, size=size, count=count):
            first = start + i * size
            begin = jnp.maximum(before + first + size - count, 0) if sliding else 0
            return one(carry, (first, size), (begin, count))

        carry = step(0, carry) if blocks == 1 else jax.lax.fori_loop(0, blocks, step, carry)
    return carry


def _scores(q, k, queries: Places, keys: Places, window, rows, columns):
    """Scores [B, G, R, rows, columns] of scaled queries in at least float32, -inf where nothing is seen."""
    scores = _match(_cut(q, rows, 3), _cut(k, columns, 2))
    seen = visible(*(_cut(a, rows, 1) for a in queries), *(_cut(a, columns, 1) for a in keys), window)
    return jnp.where(seen[:, None, None], scores, -jnp.inf)


def _match(a: Float[Array, "B G R T K"], b: Float[Array, "B G S K"]) -> Float[Array, "B G R T S"]:
    return _product("BGRK,BGSK->BGRS", _flat(a), b).reshape(*a.shape[:4], b.shape[2])


def _mix(a: Float[Array, "B G R T S"], b: Float[Array, "B G S K"]) -> Float[Array, "B G R T K"]:
    return _product("BGRS,BGSK->BGRK", _flat(a), b).reshape(*a.shape[:4], b.shape[3])


def _gather(a: Float[Array, "B G R T S"], b: Float[Array, "B G R T K"]) -> Float[Array, "B G S K"]:
    return _product("BGRS,BGRK->BGSK", _flat(a), _flat(b))


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=wide(a).dtype)


def _flat(a: jax.Array) -> jax.Array:
    """[B, G, R, T, K] as [B, G, R T, K]: products of one matrix each are faster than those of two free axes."""
    return a.reshape(*a.shape[:2], -1, a.shape[-1])


def _cut(a: jax.Array, part: tuple, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, *part, axis)


def _put(a: jax.Array, value: jax.Array, part: tuple, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(a, value.astype(a.dtype), part[0], axis)
