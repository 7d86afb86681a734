"""Dispatch without loss: from tokens to experts and back.

A slot is one choice of one token: slot n * k + j is token n's j-th. A `Plan` says which slot sits in which row of a
buffer in which every expert's rows lie together; `through` a plan, rows are gathered, computed on, and each token's
added up by weight. Four forms, which `dropless` chooses from by the platform and the numbers of tokens and experts:

    sorted_blocks  rows sorted by expert, each expert's share rounded up to whole blocks: on accelerators
    buffers_first  an equal buffer for each expert, and sorted blocks for what finds no room there: on CPUs
    dense          every expert on every token: for a handful of tokens, and the oracle of the tests
    chosen         a decode step: fewer slots than experts, each with its expert's weights fetched

Experts [N, k] may hold E, "nobody", for padding and for what a capacity left out: such a slot adds 0.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from archlab.experts.grouped import grouped_dot
from archlab.layers.alphabet import multiply
from archlab.layers.contract import wide
from archlab.layers.mlp import ClippedSwiGLU, activate

BLOCK = 128  # rows multiplied at once; smaller where an expert has fewer
ROOM = 1.5  # of an expert's buffer, in even shares
FEW = 16  # tokens for which it is fastest to run every expert: the time is that of reading the weights
_exactly = contextvars.ContextVar("exactly", default=False)


class Experts(NamedTuple):
    """The weights of all experts: up and gate [E, D, F], down [E, F, D]; their biases [E, F] and [E, D]; None where
    there is none. activation: as `activate` of `layers.mlp` takes it."""

    up: jax.Array
    gate: jax.Array | None
    down: jax.Array
    up_bias: jax.Array | None
    gate_bias: jax.Array | None
    down_bias: jax.Array | None
    activation: str | ClippedSwiGLU

    def with_arrays(self, arrays) -> "Experts":
        """The same with other weights and biases, in the order of the fields."""
        return Experts(*arrays, self.activation)

    def __call__(self, x: jax.Array, product: Callable, own: Callable) -> jax.Array:
        """The MLP of each row's own expert. `product(x, weight)` multiplies each row by its own expert's weight, and
        `own(bias)` is what to add to each row."""
        def through(x, weight, bias):
            y = product(x, weight)
            return y if bias is None else y + own(bias).astype(y.dtype)

        up = through(x, self.up, self.up_bias)
        gate = None if self.gate is None else through(x, self.gate, self.gate_bias)
        return through(activate(self.activation, up, gate), self.down, self.down_bias)


class Plan(NamedTuple):
    """rows [S]: the row of each slot, R where it has none. slots [R]: the slot in each row, S where it is empty."""

    rows: Int[Array, "S"]
    slots: Int[Array, "R"]


def plan(rows: Int[Array, "S"], count: int) -> Plan:
    """The plan of `count` rows that puts slot s into row `rows[s]`."""
    S = len(rows)
    slots, numbers = jnp.full(count, S, jnp.int32), jnp.arange(S, dtype=jnp.int32)
    return Plan(rows, slots.at[rows].set(numbers, mode="drop", unique_indices=True))


def through(plan: Plan, x: Float[Array, "N D"], weights: Float[Array, "N k"], compute: Callable) -> Float[Array, "N D"]:
    """Gathers the rows, computes on [R, D], and adds up each token's rows by weight."""
    N, k = weights.shape
    y = compute(_permute(jnp.repeat(x, k, axis=0), plan.slots, plan.rows))
    return mix(_permute(y, plan.rows, plan.slots).reshape(N, k, -1), weights)


def dropless(x: Float[Array, "N D"], experts: Int[Array, "N k"], weights: Float[Array, "N k"],
             params: Experts) -> Float[Array, "N D"]:
    """Every slot reaches its expert, in the form that is fastest for so many."""
    many = buffers_first if jax.default_backend() == "cpu" and not _exactly.get() else sorted_blocks
    form = chosen if experts.size <= len(params.up) else dense if len(x) <= FEW else many
    return form(x, experts, weights, params)


@contextlib.contextmanager
def exactly():
    """Inside, programs are made whose experts compute what is routed to them and hardly more, on any platform: for the
    accounts, which are those of a model and not of a machine."""
    token = _exactly.set(True)
    try:
        yield
    finally:
        _exactly.reset(token)


def buffers_first(x: Float[Array, "N D"], experts: Int[Array, "N k"], weights: Float[Array, "N k"],
                  params: Experts) -> Float[Array, "N D"]:
    """A buffer of equal size for each expert, with room for somewhat more than an even share. A CPU takes such batched
    products at more than twice the rate of a loop's. What finds no room goes by `sorted_blocks`: a quarter of the
    slots if they are no more, or all. A balanced router sends there little or nothing.
    """
    E, (N, k) = len(params.up), experts.shape
    room, few = math.ceil(ROOM * experts.size / E), experts.size // 4
    flat = experts.reshape(-1)
    rank, _ = rank_in_group(flat, E)
    over = (rank >= room) & (flat < E)
    fits = (rank < room) & (flat < E)
    rows = jnp.where(fits, flat * room + rank, E * room)
    buffers = lambda x: each_expert(x.reshape(E, room, -1), params).reshape(x.shape)
    y = through(plan(rows, E * room), x, weights, buffers)

    def some(x, weights, arrays):
        slots = jnp.argsort(~over, stable=True)[:few]
        names = jnp.where(over[slots], flat[slots], E)[:, None]
        rest = sorted_blocks(x[slots // k], names, weights.reshape(-1, 1)[slots], params.with_arrays(arrays))
        return jnp.zeros_like(y).at[slots // k].add(rest)

    def all_of_them(x, weights, arrays):
        return sorted_blocks(x, jnp.where(over, flat, E).reshape(N, k), weights, params.with_arrays(arrays))

    # Checkpointed: what a branch that is not taken would have saved for its gradient need not be made of zeros.
    branches = [lambda x, *_: jnp.zeros_like(x), jax.checkpoint(some), jax.checkpoint(all_of_them)]
    left = over.sum()
    return y + jax.lax.switch((left > 0).astype(int) + (left > few), branches, x, weights, params[:-1])


def sorted_blocks(x: Float[Array, "N D"], experts: Int[Array, "N k"], weights: Float[Array, "N k"],
                  params: Experts) -> Float[Array, "N D"]:
    """Rows sorted by expert, in blocks that belong to one expert each."""
    E, S = len(params.up), experts.size
    size = max(BLOCK // 16, min(BLOCK, 2 ** int(math.log2(S / E)) // 2))
    count = E + S // size  # of blocks: no more than one per expert is not full
    rank, load = rank_in_group(experts.reshape(-1), E)
    blocks = -(-load // size)
    ends = jnp.cumsum(blocks)
    starts = jnp.append((ends - blocks) * size, count * size)  # nobody's is past the end
    owners = (ends <= jnp.arange(count)[:, None]).sum(1)  # E, nobody, for unused blocks, which come last
    rows = jnp.minimum(starts[experts.reshape(-1)] + rank, count * size)
    product = lambda x, weight: grouped_dot(x, weight, owners)
    own = lambda bias: jnp.repeat(bias[jnp.minimum(owners, E - 1)], size, axis=0)
    return through(plan(rows, count * size), x, weights, lambda x: params(x, product, own))


def each_expert(buffer: Float[Array, "E R D"], params: Experts) -> Float[Array, "E R D"]:
    """Every expert on rows of its own."""
    return params(buffer, lambda x, w: multiply(x, w, "ERD,EDF->ERF"), lambda bias: bias[:, None])


def chosen(x: Float[Array, "N D"], experts: Int[Array, "N k"], weights: Float[Array, "N k"],
           params: Experts) -> Float[Array, "N D"]:
    """Fetches the weights of each slot's expert. A decode step takes the time of reading weights from memory: with
    fewer slots than experts, to read only the chosen ones is all that sparsity can save there."""
    E = len(params.up)
    own = lambda w: jnp.take(w, jnp.minimum(experts, E - 1), axis=0)
    y = params(jnp.repeat(x[:, None], experts.shape[1], axis=1), lambda x, w: multiply(x, own(w), "NKD,NKDF->NKF"), own)
    return mix(y, jnp.where(experts < E, weights, 0))


def dense(x: Float[Array, "N D"], experts: Int[Array, "N k"], weights: Float[Array, "N k"],
          params: Experts) -> Float[Array, "N D"]:
    """Every expert on every token."""
    E = len(params.up)
    product = lambda x, w: multiply(x, w, "END,EDF->ENF")
    y = params(jnp.broadcast_to(x, (E, *x.shape)), product, lambda bias: bias[:, None])
    hits = experts[..., None] == jnp.arange(E)
    return jnp.einsum("nke,nk,end->nd", hits.astype(weights.dtype), weights, wide(y)).astype(x.dtype)


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


def mix(y: Float[Array, "N k D"], weights: Float[Array, "N k"]) -> Float[Array, "N D"]:
    """Each token's rows, added up by weight."""
    return jnp.einsum("nkd,nk->nd", wide(y), weights).astype(y.dtype)
