"""What a batch of requests remembers, so that a few of its rows can run together, each at a recursion of its own.

A lane is one row's memory at one recursion. Caches are kept in place: a call writes into them, and gathers no more than
the slots that it looks at. All other memory is gathered and written back.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from archlab.attention.cache import KVCache
from archlab.layers.contract import Tokens, pytree


@pytree
class Slots:
    """The `KVCache`s of n recursions side by side: S is the sum of their slots. The first recursion stands last: as no
    other has more slots, as many as its own follow wherever one begins. sizes: the slots of each."""

    keys: Float[Array, "B G S K"]
    values: Float[Array, "B G S K"] | None
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    cursor: Int[Array, "B n"]
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, caches: tuple[KVCache, ...]) -> "Slots":
        join = lambda name, axis: None if getattr(caches[0], name) is None else jnp.concatenate(
            [getattr(cache, name) for cache in reversed(caches)], axis)
        return cls(join("keys", 2), join("values", 2), join("positions", 1), join("segments", 1),
                   jnp.stack([cache.cursor for cache in caches], 1), tuple(c.keys.shape[2] for c in caches))


@pytree
class LaneCache:
    """Some lanes of `Slots`, to which attention is a cache of W rows: it may `append` one token, and look.

    rows, recursions [W]: which lanes. writes [W]: whether they take the token; who does not only looks. Where the rows
    are all rows in their order (`whole`), nothing is gathered: slots of other recursions are looked at and not seen.
    """

    slots: Slots
    rows: Int[Array, "W"]
    recursions: Int[Array, "W"]
    writes: Bool[Array, "W"]
    whole: bool = dataclasses.field(metadata={"static": True})

    @property
    def keys(self) -> Float[Array, "W G S K"]:
        return self._look(self.slots.keys, 1)

    @property
    def values(self) -> Float[Array, "W G S K"] | None:
        return None if self.slots.values is None else self._look(self.slots.values, 1)

    @property
    def positions(self) -> Int[Array, "W S"]:
        return self._look(self.slots.positions, 0)

    @property
    def segments(self) -> Int[Array, "W S"]:
        """Of the lanes' own slots; those of other recursions are as if empty."""
        segments = self._look(self.slots.segments, 0)
        slot = jnp.arange(segments.shape[1]) - (self._first()[:, None] if self.whole else 0)
        return jnp.where((slot >= 0) & (slot < self._of_each(self.slots.sizes)[:, None]), segments, 0)

    @property
    def cursor(self) -> Int[Array, "W"]:
        return self.slots.cursor[self.rows, self.recursions]

    def append(self, keys: Float[Array, "W G 1 K"], values: Float[Array, "W G 1 K"] | None,
               tokens: Tokens) -> "LaneCache":
        """As of `KVCache`, but of one token a lane."""
        slots, took = self.slots, tokens.real[:, 0] & self.writes
        slot = self._first() + self.cursor % self._of_each(slots.sizes)
        slot = jnp.where(took, slot, slots.keys.shape[2])  # an index past the end is dropped
        head = jnp.arange(slots.keys.shape[1])
        # a write for each head, because XLA's CPU compiler is slow at writing slices
        put_heads = lambda store, new: store.at[self.rows[:, None], head, slot[:, None]].set(
            new[:, :, 0].astype(store.dtype), mode="drop")
        put = lambda store, new: store.at[self.rows, slot].set(new[:, 0], mode="drop")
        written = dataclasses.replace(
            slots, keys=put_heads(slots.keys, keys), values=jax.tree.map(put_heads, slots.values, values),
            positions=put(slots.positions, tokens.positions), segments=put(slots.segments, tokens.segments),
            cursor=slots.cursor.at[self.rows, self.recursions].add(took.astype(jnp.int32)))
        return dataclasses.replace(self, slots=written)

    def _of_each(self, numbers: tuple[int, ...]) -> Int[Array, "W"]:
        return jnp.asarray(numbers, jnp.int32)[self.recursions]

    def _first(self) -> Int[Array, "W"]:
        """Where each lane's slots begin."""
        sizes = self.slots.sizes
        return self._of_each(tuple(sum(sizes[r + 1:]) for r in range(len(sizes))))

    def _look(self, store: jax.Array, axis: int) -> jax.Array:
        """The slots of each lane, as many as the first recursion has; `axis` of a row is the slots'."""
        if self.whole:
            return store
        if len(self.slots.sizes) == 1:
            return store[self.rows]
        size = (*store.shape[1:1 + axis], self.slots.sizes[0], *store.shape[2 + axis:])

        def one(row, first):
            start = [row] + [jnp.zeros_like(row)] * len(size)
            start[1 + axis] = first
            return jax.lax.dynamic_slice(store, start, (1, *size))[0]

        return jax.vmap(one)(self.rows, self._first())


def lanes_of(states: tuple[Any, ...]) -> Any:
    """The memory of n recursions, whose states these are, as one tree: `Slots` for caches, [B, n, ...] for the rest.

    Raises: ValueError for memory that grows with its recursion's share, or is not kept by rows, and is no cache.
    """
    def join(*nodes):
        if _is_cache(nodes[0]):
            return Slots.of(nodes)
        if len({node.shape for node in nodes}) > 1:
            raise ValueError(f"decoding depth by depth knows of states of one size and of KVCache alone: not of arrays "
                             f"{', '.join(str(node.shape) for node in nodes)}")
        return jnp.stack(nodes, 1)

    return jax.tree.map(join, *states, is_leaf=_is_cache)


def look(memory: Any, rows: Int[Array, "W"], recursions: Int[Array, "W"], writes: Bool[Array, "W"]) -> Any:
    """The state of some lanes, for a layer to continue from by one token. If they are of all rows, then in order."""
    def of(node):
        if isinstance(node, Slots):
            return LaneCache(node, rows, recursions, writes, whole=rows.size == node.cursor.shape[0])
        return node[rows, recursions]

    return jax.tree.map(of, memory, is_leaf=_is_slots)


def settle(memory: Any, state: Any, rows: Int[Array, "W"], recursions: Int[Array, "W"]) -> Any:
    """The memory with what a layer made of the state that `look` gave it."""
    return jax.tree.map(lambda old, new: new.slots if isinstance(old, Slots)
                        else old.at[rows, recursions].set(new.astype(old.dtype), unique_indices=True), memory, state,
                        is_leaf=lambda node: _is_slots(node) or isinstance(node, LaneCache))


def replace_row(memory: Any, row: Int[Array, ""], one: Any) -> Any:
    """The memory with all lanes of a row replaced by those of `one`, a memory of a single row."""
    return jax.tree.map(lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new[0].astype(old.dtype), row, 0),
                        memory, one)


def _is_cache(node) -> bool:
    return isinstance(node, KVCache)


def _is_slots(node) -> bool:
    return isinstance(node, Slots)
