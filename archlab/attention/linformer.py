"""Linformer: keys and values of many places summed up in a few (Wang et al. 2020, arXiv:2006.04768).

Two forms. `Linformer` is the published one: over a text of fixed length n, K' = E K and V' = F V with E, F of r x n, so
that every token sees all others through r sums. It is NOT causal, since the sums hold later tokens too, and it keeps no
state: it is for encoders. `CausalLinformer` is for language models and IS causal: a token sees its own block of c
tokens exactly, up to itself, and each earlier block, full by then, through r sums of its c keys and values. Its work is
2 r / c of full attention's, plus the block; so is its cache.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.attention.heads import HeadsConfig, HeadsModule
from archlab.attention.positions import Positions
from archlab.attention.rules import Places
from archlab.attention.sparse_blocks import attend_seen, take
from archlab.layers.alphabet import parameter, project
from archlab.layers.config import require
from archlab.layers.contract import Aux, Place, Tokens, count_positions, pytree


class Linformer(HeadsConfig):
    """The published form: sees both ways, no state. E and F are shared by all heads ("headwise", section 4).

    length: n, the longest text. rank: r. Of a shorter text the last columns of E and F go unused. By default without
    positions, as in the paper, which adds them to the stream; rotated keys would be summed too.

    A row holds one document: where it holds more, its outputs are NaN.
    """

    positions: Positions | None = None
    length: int = 512
    rank: int = 128

    def __post_init__(self):
        super().__post_init__()
        require(self.length >= 1, self, "length", "must be at least 1")
        require(1 <= self.rank <= self.length, self, "rank", f"must be from 1 to length = {self.length}")

    @property
    def causal(self) -> bool:
        return False

    @property
    def recurrent(self) -> bool:
        return False

    @property
    def longest(self) -> int:
        return self.length

    def build(self, rngs: nnx.Rngs, at: Place) -> "LinformerModule":
        return LinformerModule(self, rngs, at)


class LinformerModule(HeadsModule):
    """The weights of `Attention`; key_sums (E) and value_sums (F) [n, r]."""

    def __init__(self, form: Linformer, rngs: nnx.Rngs, at: Place):
        super().__init__(form, rngs, at)
        self.key_sums = parameter(rngs, "T->.", (form.length, form.rank))
        self.value_sums = parameter(rngs, "T->.", (form.length, form.rank))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return None

    def __call__(self, x, tokens: Tokens, state=None):
        """ValueError for a text longer than n, and for a state: there is none."""
        T = x.shape[1]
        if state is not None:
            raise ValueError("Linformer sees both ways and keeps no state; CausalLinformer does")
        if T > self.form.length:
            raise ValueError(f"Linformer.length = {self.form.length}: too short for a text of {T} tokens")
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in self.heads(x, tokens))
        sum_up = lambda a, weight: jnp.einsum("BTGK,TM->BMGK", jnp.where(tokens.real[:, :, None, None], a, 0),
                                              weight[:T].astype(a.dtype))
        k, v = sum_up(k, self.key_sums[...]), sum_up(v, self.value_sums[...])
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        seen = jnp.broadcast_to(tokens.real[:, :, None], (*tokens.real.shape, k.shape[1]))
        y = attend_seen(*(a[:, None] for a in (grouped, k, v, seen)))[:, 0].reshape(q.shape)
        alone = ((tokens.segments == tokens.segments[:, :1]) | ~tokens.real).all(1)
        y = jnp.where(alone[:, None, None, None], y, jnp.nan)
        return project(y, self.out, "BTHK,HKD->BTD"), None, Aux()


class CausalLinformer(HeadsConfig):
    """The causal form. block: c. rank: r. E and F, of r x c, are shared by all heads and blocks.

    Blocks count from the document's start, and only tokens that reach the layer: behind a router those are not all.
    Positions are those of `Attention`: a sum is of turned keys.
    """

    block: int = 128
    rank: int = 16

    def __post_init__(self):
        super().__post_init__()
        require(self.block >= 1, self, "block", "must be at least 1")
        require(1 <= self.rank <= self.block, self, "rank", f"must be from 1 to block = {self.block}")

    @property
    def recurrent(self) -> bool:
        return False

    def build(self, rngs: nnx.Rngs, at: Place) -> "CausalLinformerModule":
        return CausalLinformerModule(self, rngs, at)


@pytree
class LinformerState:
    """Of each row's last document: sums of keys and values of its full blocks [B, N, r, G, K], block n in slot n; and
    the keys and values of the block it is in [B, c, G, K]. segment [B]: that document; length [B]: how many tokens it
    has had."""

    key_sums: Float[Array, "B N M G K"]
    value_sums: Float[Array, "B N M G K"]
    keys: Float[Array, "B C G K"]
    values: Float[Array, "B C G K"]
    segment: Int[Array, "B"]
    length: Int[Array, "B"]


class CausalLinformerModule(HeadsModule):
    """The weights of `Attention`; key_sums (E) and value_sums (F) [c, r]."""

    def __init__(self, form: CausalLinformer, rngs: nnx.Rngs, at: Place):
        super().__init__(form, rngs, at)
        self.key_sums = parameter(rngs, "T->.", (form.block, form.rank))
        self.value_sums = parameter(rngs, "T->.", (form.block, form.rank))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        (_, G, K), (c, r) = self.key.shape, self.key_sums.shape
        zeros = lambda *shape: jnp.zeros((batch, *shape, G, K), dtype)
        numbers = lambda: jnp.zeros((batch,), jnp.int32)
        return LinformerState(zeros(max_length // c, r), zeros(max_length // c, r), zeros(c), zeros(c), numbers(),
                              numbers())

    def __call__(self, x, tokens: Tokens, state: LinformerState | None = None):
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in self.heads(x, tokens))
        B, T, G, K = k.shape
        c, past = self.form.block, self.init_state(B, 0, x.dtype) if state is None else state
        positions, *now = count_positions(tokens.segments, past.segment, past.length)
        queries, begun = Places(tokens.segments, positions), positions[:, :1]  # begun: tokens before the piece

        # The line of keys: the block that the first token may stand in the middle of, then the piece.
        slots = jnp.arange(c)
        before = Places(jnp.where(slots < begun % c, tokens.segments[:, :1], 0), begun // c * c + slots)
        join = lambda a, b: jnp.concatenate([a.astype(b.dtype), b], 1)
        line, places = [join(past.keys, k), join(past.values, v)], Places(*map(join, before, queries))

        # Blocks that end in the piece, and their sums, behind those that ended before it.
        ends = jnp.where(tokens.real & (positions % c == c - 1), jnp.arange(T), T)
        ends = jnp.sort(ends, 1)[:, : -(-T // c)]
        at_end = lambda a: jnp.where(ends < T, jnp.take_along_axis(a, jnp.minimum(ends, T - 1), 1), 0)
        rows = ends[..., None] - (c - 1) + slots
        rows = jnp.where(rows >= 0, c + rows, slots)  # those before the piece stand in their slots
        sum_up = lambda a, weight: jnp.einsum("BNCGK,CM->BNMGK", take(a, rows), weight[...].astype(a.dtype))
        new = [sum_up(line[0], self.key_sums), sum_up(line[1], self.value_sums)]
        full = Places(at_end(tokens.segments), at_end(positions) // c)  # of these, places count blocks
        known = jnp.arange(past.key_sums.shape[1])
        sums = [join(past.key_sums, new[0]), join(past.value_sums, new[1])]
        summed = Places(join(jnp.where(known < begun // c, tokens.segments[:, :1], 0), full.segments),
                        join(jnp.broadcast_to(known, (B, len(known))), full.positions))

        y = self._attend(q.reshape(B, T, G, -1, K), queries, line, places, sums, summed)
        if state is not None:
            state = LinformerState(*self._write(state, k, v, queries, new, full), *now)
        return project(y.reshape(q.shape), self.out, "BTHK,HKD->BTD"), state, Aux()

    def _attend(self, q, queries: Places, line, places: Places, sums, summed: Places):
        """Attention, as many queries at a time as a block has: to all sums, and to the keys of the line from a block
        before them on."""
        T, (c, r) = q.shape[1], self.key_sums.shape
        flat = [a.reshape(a.shape[0], -1, *a.shape[3:]) for a in sums]

        def one(now):
            q, queries, near, places = now
            keys, values = (jnp.concatenate(pair, 1) for pair in zip(flat, near))
            own = lambda a: a[:, :, None]
            whole = (own(queries.segments) == summed.segments[:, None]) & \
                (own(queries.positions // c) > summed.positions[:, None])
            exact = (own(queries.segments) == places.segments[:, None]) & \
                (own(queries.positions // c) == places.positions[:, None] // c) & \
                (own(queries.positions) >= places.positions[:, None])
            seen = jnp.concatenate([jnp.repeat(whole, r, 2), exact], 2) & own(queries.segments > 0)
            return attend_seen(*(a[:, None] for a in (q, keys, values, seen)))[:, 0]

        if T <= c:
            return one((q, queries, line, places))
        count = -(-T // c)
        cut = lambda a: jnp.moveaxis(jnp.pad(a, [(0, 0), (0, -T % c)] + [(0, 0)] * (a.ndim - 2))
                                     .reshape(a.shape[0], -1, c, *a.shape[2:]), 1, 0)
        pairs = lambda a: jnp.concatenate([cut(a)[:-1], cut(a)[1:]], 2)
        steps = cut(q), jax.tree.map(cut, queries), *jax.tree.map(pairs, (line, places))
        y = jax.lax.map(jax.checkpoint(one), steps)
        return jnp.moveaxis(y, 0, 1).reshape(q.shape[0], count * c, *q.shape[2:])[:, :T]

    def _write(self, state: LinformerState, k, v, queries: Places, new, full: Places):
        """The state's sums, keys and values with those of a piece's last document in them."""
        c, (segments, positions) = self.form.block, queries
        end = jnp.maximum((segments > 0).sum(1, keepdims=True) - 1, 0)
        segment, position = (jnp.take_along_axis(a, end, 1) for a in queries)
        kept = (segments > 0) & (segments == segment) & (positions // c == position // c)
        slot = jnp.where(kept, positions % c, c)  # an index past the end is dropped
        block = jnp.where((full.segments == segment) & (segment > 0), full.positions, state.key_sums.shape[1])
        put = lambda store, at, new: store.at[jnp.arange(len(k))[:, None], at].set(new.astype(store.dtype), mode="drop")
        return (put(state.key_sums, block, new[0]), put(state.value_sums, block, new[1]),
                put(state.keys, slot, k), put(state.values, slot, v))
