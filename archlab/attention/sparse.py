"""Sparse attention: a token sees its document's first tokens, those near it and, in BigBird, a few blocks by chance.

Longformer: Beltagy et al. 2020 (arXiv:2004.05150), section 3.1; BigBird: Zaheer et al. 2020 (arXiv:2007.14062),
section 2 and appendix D. Both are published as encoders that see both ways; these are their causal forms, for language
models. What is left of the global tokens is that all see them: to see all, they would have to look ahead. So there are
no separate projections for what global tokens see (Longformer), and BigBird's last block is not global.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.attention.heads import HeadsConfig, HeadsModule
from archlab.attention.rules import Places
from archlab.attention.sparse_blocks import attend_sparse
from archlab.layers.alphabet import project
from archlab.layers.config import require
from archlab.layers.contract import Aux, Place, Tokens, count_positions, pytree
from archlab.layers.sharding import per_shard


class SparseAttention(HeadsConfig):
    """Base of the patterns (`sparse_blocks.Pattern`). A decode step reads only what the pattern names.

    pinned: how many of a document's first tokens are always seen. reach: how many places back, itself included, the
    rest of what a token sees may lie; None for any. With a reach the cache is a ring behind the pinned tokens. Places
    are counted by the layer, among the tokens that reach it: behind a router those are not all of the document's.
    """

    @property
    def recurrent(self) -> bool:
        return self.reach is not None

    def slot(self, places):
        if self.reach is None:
            return places
        return jnp.where(places < self.pinned, places, self.pinned + (places - self.pinned) % self.reach)

    def build(self, rngs: nnx.Rngs, at: Place) -> "SparseAttentionModule":
        return SparseAttentionModule(self, rngs, at)


class Longformer(SparseAttention):
    """A token sees the `window` nearest, itself included, and its document's first `globals` tokens."""

    window: int = 512
    globals: int = 1

    block = 64  # queries that share their keys; changes nothing but the speed

    def __post_init__(self):
        super().__post_init__()
        require(self.window >= 1, self, "window", "must be at least 1")
        require(self.globals >= 0, self, "globals", "must be 0 or more")

    @property
    def pinned(self) -> int:
        return self.globals

    @property
    def reach(self) -> int:
        return self.window

    def columns(self, blocks, layer):
        near = blocks[..., None] * self.block + jnp.arange(1 - self.window, self.block)
        first = jnp.broadcast_to(jnp.arange(self.globals), (*blocks.shape, self.globals))
        return jnp.concatenate([first, jnp.where(near >= self.globals, near, -1)], -1)

    def sees(self, queries, keys):
        return (keys < self.globals) | (queries - keys < self.window)


class BigBird(SparseAttention):
    """Blocks of `block` tokens, counted from the document's start. A token sees, up to itself, its own block and those
    before it, `window` in all; the document's first `globals` blocks; and `random` of the blocks between.

    The graph of who sees whom is the same for all heads, as in section 2 of the paper; each layer has one of its own.
    The random blocks of a block depend on `seed`, the layer and the block's number alone, and are drawn without
    replacement; a block with no more than `random` to choose from sees them all. Published sizes: blocks of 64, and 3
    in the window, 2 global and 3 random.
    """

    block: int = 64
    window: int = 3
    globals: int = 2
    random: int = 3
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for field in ("block", "window"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")
        for field in ("globals", "random", "seed"):
            require(getattr(self, field) >= 0, self, field, "must be 0 or more")

    @property
    def pinned(self) -> int:
        return self.globals * self.block

    @property
    def reach(self) -> int | None:
        return None if self.random else self.window * self.block

    def columns(self, blocks, layer):
        places = lambda starts, count: starts * self.block + jnp.arange(count * self.block)
        near = places(blocks[..., None] - self.window + 1, self.window)
        first = jnp.broadcast_to(jnp.arange(self.pinned), (*blocks.shape, self.pinned))
        drawn = jnp.vectorize(lambda n: self.draw(n, layer), signature="()->(r)")(blocks)[..., None]
        drawn = jnp.where(drawn >= 0, places(drawn, 1), -1).reshape(*blocks.shape, -1)
        return jnp.concatenate([first, drawn, jnp.where(near >= self.pinned, near, -1)], -1)

    def sees(self, queries, keys):
        return True

    def draw(self, block: Int[Array, ""], layer: Int[Array, "1"]) -> Int[Array, "random"]:
        """The numbers of the random blocks that a block sees; -1 for none. Every choice of them is as likely as any
        other (Floyd's algorithm: Bentley & Floyd 1987)."""
        between = jnp.maximum(block - self.window + 1 - self.globals, 0)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), layer[0]), block)
        bits = jax.random.bits(key, (self.random,), jnp.uint32)
        drawn = jnp.full((self.random,), -1, jnp.int32)
        for i in range(self.random):
            last = between - self.random + i
            pick = (bits[i] % jnp.maximum(last + 1, 1).astype(jnp.uint32)).astype(jnp.int32)
            pick = jnp.where((drawn == pick).any(), last, pick)
            drawn = drawn.at[i].set(jnp.where(last >= 0, pick, -1))
        return jnp.where(drawn >= 0, drawn + self.globals, -1)


@pytree
class SparseState:
    """keys, values: of each row's last document, at `SparseAttention.slot` of their places. segment [B]: that document;
    length [B]: how many tokens it has had."""

    keys: Float[Array, "B S G K"]
    values: Float[Array, "B S G K"]
    segment: Int[Array, "B"]
    length: Int[Array, "B"]


class SparseAttentionModule(HeadsModule):
    """The weights of `Attention`. layer [1] int32, no weight: the number of the layer, for which blocks are drawn."""

    def __init__(self, form: SparseAttention, rngs: nnx.Rngs, at: Place):
        super().__init__(form, rngs, at)
        self.layer = nnx.Variable(jnp.full((1,), at.index, jnp.int32))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        form, (_, G, K) = self.form, self.key.shape
        slots = max_length if form.reach is None else min(max_length, form.pinned + form.reach)
        store = lambda: jnp.zeros((batch, slots, G, K), dtype)
        numbers = lambda: jnp.zeros((batch,), jnp.int32)
        return SparseState(store(), store(), numbers(), numbers())

    def __call__(self, x, tokens: Tokens, state: SparseState | None = None):
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in self.heads(x, tokens))
        B, T, G, K = k.shape
        none = jnp.zeros((B,), jnp.int32)
        past = (none, none) if state is None else (state.segment, state.length)
        places, *now = count_positions(tokens.segments, *past)
        keys, values, slots = k, v, 0
        if state is not None:
            old, state = state, SparseState(*self._write(state, k, v, Places(tokens.segments, places)), *now)
            keys, values, slots = state.keys, state.values, None
            if T > 1:  # the piece's last tokens may stand where its first ones look
                keys, values = (jnp.concatenate([a.astype(x.dtype), b], 1) for a, b in ((old.keys, k), (old.values, v)))
                slots = old.keys.shape[1]

        def run(q, k, v, segments, places, layer):
            return attend_sparse(self.form, slots, q, k, v, Places(segments, places), layer)

        run = per_shard(run, "BTG.K BTGK BTGK BT BT .", "BTG.K")
        y = run(q.reshape(B, T, G, -1, K), keys, values, tokens.segments, places, self.layer[...])
        return project(y.reshape(q.shape), self.out, "BTHK,HKD->BTD"), state, Aux()

    def _write(self, state: SparseState, k, v, new: Places):
        """The state's keys and values with a piece's last document in them; in a ring, the last of its tokens."""
        form, slots = self.form, state.keys.shape[1]
        end = jnp.maximum((new.segments > 0).sum(1, keepdims=True) - 1, 0)
        last = Places(*(jnp.take_along_axis(a, end, 1) for a in new))
        kept = (new.segments > 0) & (new.segments == last.segments)
        if form.reach is not None:
            kept &= (new.positions < form.pinned) | (last.positions - new.positions < form.reach)
        slot = jnp.where(kept, form.slot(new.positions), slots)  # an index past the end is dropped
        row = jnp.arange(k.shape[0])[:, None]
        put = lambda store, new: store.at[row, slot].set(new.astype(store.dtype), mode="drop")
        return put(state.keys, k), put(state.values, v)
