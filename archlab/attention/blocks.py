"""Attention by blocks of queries, with its gradient: exact, and no more than a block's scores is held at a time.

As in FlashAttention (Dao et al. 2022, arXiv:2205.14135; the gradient is in its appendix B.2) the forward pass keeps of
the scores only the logarithm of each row's sum of exponentials, from which the backward pass has the weights again. A
block meets all its keys at once, since a CPU's cache holds its scores: nothing is rescaled on the way.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from archlab.attention.rules import Places, Rules, distances, visible
from archlab.layers.contract import wide

BLOCK = 128  # queries in a block: its scores stay in the second-level cache
GROUPS = 8  # stretches into which long texts are cut: the work done in vain, behind the mask, is 1/GROUPS of the rest


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_blocks(q: Float[Array, "B H T K"], k: Float[Array, "B G S K"], v: Float[Array, "B G S C"], queries: Places,
                  keys: Places, rules: Rules = Rules(), ordered: bool = True,
                  block: int = BLOCK) -> Float[Array, "B H T C"]:
    """softmax(scores) v of what is visible; rows that see nothing give 0. G divides H; values may be of another size.

    Args: rules: what becomes of the scores. ordered: the keys stand in order and end with the queries' own, so that
      those out of sight need not be computed. A cache's slots are not ordered: all are looked at.
    """
    return _forward(q, k, v, queries, keys, rules, ordered, block)[0]


def _forward(q, k, v, queries, keys, rules, ordered, block):
    B, H, T, K = q.shape
    grouped = rules.scaled(q).reshape(B, k.shape[1], -1, T, K)

    def one(carry, rows, columns, near):
        y, total = carry
        k, v, keys = near
        these = _pick(queries, rows)
        scores = _hide(rules.adjust(_match(_cut(grouped, rows, 3), k), distances(these, keys)), these, keys, rules)
        top = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(scores.dtype).min)
        top = top if rules.sinks is None else jnp.maximum(top, _per_head(rules.sinks, scores))
        weights = jnp.exp(scores - top)
        sums = weights.sum(-1, keepdims=True)
        sums = sums if rules.sinks is None else sums + jnp.exp(_per_head(rules.sinks, scores) - top)
        sums = jnp.maximum(sums, jnp.finfo(scores.dtype).tiny)
        out = _mix(weights.astype(v.dtype), v) / sums.astype(v.dtype)
        return _put(y, out, rows, 3), _put(total, (top + jnp.log(sums))[..., 0], rows, 3)

    each = grouped.shape[:-1]
    carry = jnp.zeros((*each, v.shape[-1]), q.dtype), jnp.zeros(each, wide(q).dtype)
    y, total = _fold(one, carry, k, v, keys, T, rules.sight, ordered, block)
    y = y.reshape(B, H, T, -1)
    return y, (q, k, v, queries, keys, rules, y, total)


def _backward(ordered, block, saved, dy):
    q, k, v, queries, keys, rules, y, total = saved
    T = q.shape[2]
    q, y, dy = (a.reshape(total.shape + (-1,)) for a in (rules.scaled(q), y, dy))
    inner = (wide(y) * dy).sum(-1)  # sum over keys of weight times its gradient

    def one(carry, rows, columns, near):
        dq, dk, dv, drules = carry
        k, v, keys = near
        these, q_, dy_ = _pick(queries, rows), _cut(q, rows, 3), _cut(dy, rows, 3)
        scores, pull = jax.vjp(lambda raw, rules: rules.adjust(raw, distances(these, keys)), _match(q_, k), rules)
        weights = jnp.exp(_hide(scores, these, keys, rules) - _cut(total, rows, 3)[..., None])
        draw, more = pull(weights * (_match(dy_, v) - _cut(inner, rows, 3)[..., None]))
        draw = draw.astype(q.dtype)
        add = lambda total, a, b: _put(total, _cut(total, columns, 2) + _gather(a, b), columns, 2)
        return (_put(dq, _mix(draw, k), rows, 3), add(dk, draw, q_), add(dv, weights.astype(v.dtype), dy_),
                jax.tree.map(jnp.add, drules, more))

    zeros = jnp.zeros_like(q), jnp.zeros_like(wide(k)), jnp.zeros_like(wide(v)), jax.tree.map(jnp.zeros_like, rules)
    dq, dk, dv, drules = _fold(one, zeros, k, v, keys, T, rules.sight, ordered, block)
    if rules.sinks is not None:  # a sink's weight times its gradient, which is 0 less the mean over all keys
        sink = jnp.exp(_per_head(rules.sinks, total[..., None])[..., 0] - total)
        dsinks = -(sink * inner).sum((0, 3)).reshape(-1).astype(rules.sinks.dtype)
        drules = dataclasses.replace(drules, sinks=dsinks)
    dq = rules.scaled(dq.reshape(dq.shape[0], -1, *dq.shape[3:]))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None, drules


attend_blocks.defvjp(_forward, _backward)


def _fold(one, carry, k, v, keys: Places, T: int, sight, ordered: bool, block: int):
    """`carry = one(carry, rows, columns, near)` for each block of queries and the stretch of keys that it may see; each
    of the two is (first, count), and `near` the stretch of `k`, `v` and `keys`.

    Blocks of a short text are unrolled, each with the keys up to its end. Long texts are cut into `GROUPS` loops, each
    with the keys up to the loop's end: in a loop, unlike an unrolled program, one block's scores are dead before the
    next's are made. The order of the loops is fixed by what they carry.
    """
    S, whole = k.shape[2], T // block
    stretch = lambda columns: (_cut(k, columns, 2), _cut(v, columns, 2), _pick(keys, columns))
    each = max(1, -(-whole // GROUPS))
    groups = [(i * block, min(each, whole - i), block) for i in range(0, whole, each)]
    if T % block:
        groups.append((whole * block, 1, T % block))
    before = S - T  # keys older than the first query
    sliding = ordered and sight.reach is not None
    for start, blocks, size in groups:
        count = before + start + blocks * size if ordered and sight.causal else S
        after = 0 if sight.causal or not sliding else sight.reach - 1  # keys later than the last query of a block
        if sliding:
            count = min(count, sight.reach - 1 + size + after)

        shared = None if sliding else stretch((0, count))  # outside of the loop: it is a copy

        def step(i, carry, start=start, size=size, count=count, after=after, shared=shared):
            first = start + i * size
            begin = jnp.clip(before + first + size + after - count, 0, S - count) if sliding else 0
            return one(carry, (first, size), (begin, count), stretch((begin, count)) if sliding else shared)

        carry = step(0, carry) if blocks == 1 else jax.lax.fori_loop(0, blocks, step, carry)
    return carry


def _hide(scores: Float[Array, "B G R T S"], queries: Places, keys: Places, rules: Rules):
    """Scores with -inf where nothing is seen. It is added, not chosen by `where`: XLA's CPU compiler computes what all
    heads share once if it is a summand, and else once for each head, which takes as long as all the rest."""
    seen = visible(queries, keys, rules.sight)
    return scores + jnp.where(seen, 0, -jnp.inf).astype(scores.dtype)[:, None, None]


def _pick(places: Places, part: tuple) -> Places:
    return Places(*(_cut(a, part, 1) for a in places))


def _per_head(values: Float[Array, "H"], like: Float[Array, "B G R T S"]) -> jax.Array:
    return values.astype(like.dtype).reshape(like.shape[1:3])[:, :, None, None]


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
