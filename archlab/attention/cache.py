"""The key-value cache: what attention remembers between calls."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from archlab.layers.contract import Tokens, pytree


@pytree
class KVCache:
    """Keys and values in slots, each with its place and document; a cursor per row counts the tokens ever written.

    keys, values [B, G, S, K]; positions, segments [B, S] int32 (segment 0: an empty slot); cursor [B] int32. With a
    sliding window S is the window and slots are used in a ring. Padding takes no slot. values is None where keys serve
    as values too, and are stored once (latent attention).
    """

    keys: Float[Array, "B G S K"]
    values: Float[Array, "B G S K"] | None
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    cursor: Int[Array, "B"]

    @classmethod
    def empty(cls, batch: int, heads: int, slots: int, size: int, dtype, values: bool = True) -> "KVCache":
        numbers = lambda *shape: jnp.zeros((batch, *shape), jnp.int32)
        store = lambda: jnp.zeros((batch, heads, slots, size), dtype)
        return cls(store(), store() if values else None, numbers(slots), numbers(slots), numbers())

    @classmethod
    def of(cls, keys: Float[Array, "B G T K"], values: Float[Array, "B G T K"] | None, tokens: Tokens,
           reach: int | None = None) -> "KVCache":
        """The cache of a text that is one piece: its keys and values as they are, a slot for each token.

        Nothing is dropped, though a ring would hold the last `reach` of them alone. A text of just as many gets one
        more slot, which stays empty, lest it be taken for a ring (`attend_kept`).
        """
        spare = int(keys.shape[2] == reach)
        heads = lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, spare), (0, 0))) if spare else a
        numbers = lambda a: jnp.pad(jnp.where(tokens.real, a, 0), ((0, 0), (0, spare)))
        return cls(heads(keys), jax.tree.map(heads, values), numbers(tokens.positions), numbers(tokens.segments),
                   tokens.real.sum(1, dtype=jnp.int32))

    def append(self, keys: Float[Array, "B G T K"], values: Float[Array, "B G T K"] | None,
               tokens: Tokens) -> "KVCache":
        """The cache with a piece's real tokens written; in a ring, only the last S of them. A full
        cache without a window loses its oldest tokens too, which is wrong: callers size caches by `max_length`."""
        slots = self.keys.shape[2]
        real = tokens.real
        order = self.cursor[:, None] + jnp.cumsum(real, axis=1) - 1
        total = self.cursor + real.sum(1, dtype=jnp.int32)
        kept = real & (order >= total[:, None] - slots)
        slot = jnp.where(kept, order % slots, slots)  # an index past the end is dropped
        row, head = jnp.arange(keys.shape[0])[:, None], jnp.arange(keys.shape[1])[:, None]

        def put(store, new):
            return store.at[row, slot].set(new.astype(store.dtype), mode="drop")

        def put_heads(store, new):
            if new.shape[2] == 1:  # a write for each head; of a single one, XLA's CPU compiler copies the cache
                where = slot[:, None]
                if where.size * head.size == 1:  # so a second beside it, which is dropped
                    where, new = jnp.append(where, jnp.full_like(where, slots), 2), jnp.repeat(new, 2, 2)
                return store.at[row[:, None], head, where].set(new.astype(store.dtype), mode="drop")
            return store.at[row, :, slot].set(jnp.swapaxes(new, 1, 2).astype(store.dtype), mode="drop")

        return KVCache(put_heads(self.keys, keys), jax.tree.map(put_heads, self.values, values),
                       put(self.positions, tokens.positions), put(self.segments, tokens.segments), total)

    def in_order(self) -> "KVCache":
        """A ring turned so that its oldest token comes first and its newest last; empty slots before them."""
        slots = self.keys.shape[2]
        order = (self.cursor[:, None] + jnp.arange(slots)) % slots
        heads = lambda store: jnp.take_along_axis(store, order[:, None, :, None], 2)
        numbers = lambda store: jnp.take_along_axis(store, order, 1)
        return KVCache(heads(self.keys), jax.tree.map(heads, self.values),
                       numbers(self.positions), numbers(self.segments), self.cursor)


def kept(layer, state: KVCache | None) -> KVCache:
    """The cache that a layer is to read, where `Tokens.keys` is "read". Raises: ValueError where there is none."""
    if state is None:
        raise ValueError(f"{type(layer).__name__}: Tokens.keys = 'read' needs a state to read from")
    return state
