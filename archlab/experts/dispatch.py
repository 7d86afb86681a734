"""Dispatch: from tokens to experts and back.

A slot is one choice of one token: slot n * k + j is token n's j-th. A `Plan` says which slot sits in which row of a
buffer in which every expert's rows lie together. Every form is the same three steps, gather the rows, run the experts,
add up each token's rows by weight, and differs in its plan alone:

    dropless       rows sorted by expert, each expert's share rounded up to whole blocks; nothing is ever lost
    with_capacity  a fixed number of rows per expert and sequence; what does not fit was left out by `fit`
    chosen         a decode step: few slots, each with its expert's weights fetched
    dense          every expert on every token: the oracle of the tests

Experts [N, k] may hold E, "nobody", for padding and for what was left out: such a slot gets no row and adds 0.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from archlab.experts.grouped import grouped_dot
from archlab.layers.contract import wide

BLOCK = 128  # rows multiplied at once; smaller where an expert has fewer


class Experts(NamedTuple):
    """The weights of all experts, and their activation: up and gate [E, D, F] (gate may be None), down [E, F, D]."""

    up: jax.Array
    gate: jax.Array | None
    down: jax.Array
    activation: Callable

    def __call__(self, x: jax.Array, product: Callable) -> jax.Array:
        """The MLP of each row's own expert; `product(x, weight)` multiplies each row by its own expert's weight."""
        up = product(x, self.up)
        hidden = self.activation(up) if self.gate is None else self.activation(product(x, self.gate)) * up
        return product(hidden, self.down)


class Plan(NamedTuple):
    """rows [S]: the row of each slot, R where it has none. slots [R]: the slot in each row, S where it is empty."""

    rows: Int[Array, "S"]
    slots: Int[Array, "R"]


def plan(rows: Int[Array, "S"], count: int) -> Plan:
    """The plan of `count` rows that puts slot s into row `rows[s]`."""
    S = len(rows)
    slots = jnp.full(count, S, jnp.int32).at[rows].set(jnp.arange(S, dtype=jnp.int32), mode="drop", unique_indices=True)
    return Plan(rows, slots)


def through(plan: Plan, x: Float[Array, "N D"], weights: Float[Array, "N k"], compute: Callable) -> Float[Array, "N D"]:
    """Gathers the rows, computes on [R, D], and adds up each token's rows by weight."""
    N, k = weights.shape
    y = compute(_permute(jnp.repeat(x, k, axis=0), plan.slots, plan.rows))
    return _mix(_permute(y, plan.rows, plan.slots).reshape(N, k, -1), weights)


def run(x: Float[Array, "B T D"], experts: Int[Array, "B T k"], weights: Float[Array, "B T k"], params: Experts,
        capacity: int | None) -> Float[Array, "B T D"]:
    """The experts' weighted outputs, on one device: dropless, or in buffers of a capacity."""
    if capacity is not None:
        return with_capacity(x, experts, weights, len(params.up), capacity, lambda buffer: each_expert(buffer, params))
    flat = lambda a: a.reshape(-1, a.shape[-1])
    return dropless(flat(x), flat(experts), flat(weights), params).reshape(x.shape)


def dropless(x: Float[Array, "N D"], experts: Int[Array, "N k"], weights: Float[Array, "N k"],
             params: Experts) -> Float[Array, "N D"]:
    """Every slot reaches its expert: rows sorted by expert, in blocks that belong to one expert each."""
    E, S = len(params.up), experts.size
    if S <= E:
        return chosen(x, experts, weights, params)
    size = max(BLOCK // 16, min(BLOCK, 2 ** int(math.log2(S / E)) // 8))
    count = E + S // size  # of blocks: no more than one per expert is not full
    rank, load = rank_in_group(experts.reshape(-1), E)
    blocks = -(-load // size)
    ends = jnp.cumsum(blocks)
    starts = jnp.append((ends - blocks) * size, count * size)  # nobody's is past the end
    owners = jnp.minimum((ends <= jnp.arange(count)[:, None]).sum(1), E - 1)  # unused blocks come last
    rows = jnp.minimum(starts[experts.reshape(-1)] + rank, count * size)
    product = lambda x, weight: grouped_dot(x, weight, owners)
    return through(plan(rows, count * size), x, weights, lambda x: params(x, product))


def chosen(x: Float[Array, "N D"], experts: Int[Array, "N k"], weights: Float[Array, "N k"],
           params: Experts) -> Float[Array, "N D"]:
    """Fetches the weights of each slot's expert. A decode step takes the time of reading weights from memory: with
    fewer slots than experts, to read only the chosen ones is all that sparsity can save there."""
    E = len(params.up)
    product = lambda x, w: _einsum("nkd,nkdf->nkf", x, jnp.take(w, jnp.minimum(experts, E - 1), axis=0))
    y = params(jnp.repeat(x[:, None], experts.shape[1], axis=1), product)
    return _mix(y, jnp.where(experts < E, weights, 0))


def with_capacity(x: Float[Array, "B T D"], experts: Int[Array, "B T k"], weights: Float[Array, "B T k"],
                  count: int, capacity: int, compute: Callable) -> Float[Array, "B T D"]:
    """`capacity` rows for each of `count` experts and each sequence; `experts` must have passed `fit`.

    Args: compute: from a buffer [E, B * capacity, D] to one of the same shape (`each_expert`).
    """
    (B, T, k), D = experts.shape, x.shape[-1]
    group = jnp.where(experts < count, experts * B + jnp.arange(B)[:, None, None], count * B).reshape(-1)
    rank, _ = rank_in_group(group, count * B)
    R = count * B * capacity
    rows = jnp.minimum(group * capacity + rank, R)
    buffer = lambda x: compute(x.reshape(count, B * capacity, D)).reshape(R, D)
    y = through(plan(rows, R), x.reshape(-1, D), weights.reshape(-1, k), buffer)
    return y.reshape(x.shape)


def each_expert(buffer: Float[Array, "E R D"], params: Experts) -> Float[Array, "E R D"]:
    """Every expert on rows of its own."""
    return params(buffer, lambda x, w: _einsum("erd,edf->erf", x, w))


def dense(x: Float[Array, "N D"], experts: Int[Array, "N k"], weights: Float[Array, "N k"],
          params: Experts) -> Float[Array, "N D"]:
    """Every expert on every token."""
    E = len(params.up)
    y = params(jnp.broadcast_to(x, (E, *x.shape)), lambda x, w: _einsum("end,edf->enf", x, w))
    hits = experts[..., None] == jnp.arange(E)
    return jnp.einsum("nke,nk,end->nd", hits.astype(weights.dtype), weights, wide(y)).astype(x.dtype)


def rows_per_expert(factor: float, k: int, experts: int, length: int) -> np.ndarray:
    """[length + 1]: how many tokens of a sequence with n real tokens an expert takes: `min(n, ceil(factor * k * n / E))`.

    The count is that of one sequence, so neither the mesh nor the micro-batch changes what is dropped; and of its real
    tokens, so neither does padding. `factor` 1 is room for a perfectly balanced choice, all k choices counted (GShard
    and Switch, where k is 1, leave k out of the formula).
    """
    n = np.arange(length + 1)
    return np.minimum(n, np.ceil(factor * k * n / experts - 1e-9)).astype(np.int32)  # 1e-9: round-off is no token


def fit(experts: Int[Array, "B T k"], count: int, room: Int[Array, "B"]) -> Int[Array, "B T k"]:
    """The choices, with "nobody" in the place of those that find their expert full in their sequence.

    Args: room [B]: how many tokens an expert takes. Tokens queue in order of time (in GShard all second choices come
    after all first ones, by which a later token can push an earlier one out: a look into the future).
    """
    asks = (experts[..., None] == jnp.arange(count)).any(2)  # [B, T, E]
    before = jnp.cumsum(asks, axis=1) - asks
    rank = jnp.take_along_axis(before, jnp.minimum(experts, count - 1), axis=2)
    return jnp.where(rank < room[:, None, None], experts, count)


def rank_in_group(group: Int[Array, "S"], count: int) -> tuple[Int[Array, "S"], Int[Array, "count"]]:
    """The place of each slot among those of its group, in their order; and the size of each group.

    Group `count` is nobody's: it is ranked, but not among the sizes.
    """
    order = jnp.argsort(group, stable=True)
    sizes = jnp.zeros(count + 1, group.dtype).at[group].add(1)
    first = jnp.cumsum(sizes) - sizes
    rank = jnp.arange(len(group), dtype=group.dtype) - first[group[order]]
    return jnp.zeros_like(group).at[order].set(rank, unique_indices=True), sizes[:count]


@jax.custom_vjp
def _permute(x, index, inverse):
    """Rows of `x` by index, zeros where it points past the end; `inverse` leads back, so the gradient gathers too
    (left alone it would scatter, which accelerators do slowly)."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


_permute.defvjp(lambda x, index, inverse: (_permute(x, index, inverse), (inverse, index)),
                lambda saved, d: (_permute(d, *saved), None, None))


def _mix(y: Float[Array, "N k D"], weights: Float[Array, "N k"]) -> Float[Array, "N D"]:
    return jnp.einsum("nkd,nk->nd", wide(y), weights).astype(y.dtype)


def _einsum(spec, x, weight):
    return jnp.einsum(spec, x, weight.astype(x.dtype), preferred_element_type=wide(x).dtype).astype(x.dtype)
