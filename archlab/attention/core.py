"""The attention core: softmax(Q K^T / sqrt(K)) V under the masks that tokens imply.

`attend` chooses the best form for the platform, `attend_state` does so where there is a cache, `attend_kept` where the
cache is only read; `attend_plain`, which keeps every score, is the oracle they are tested against. Heads come before
time ("BHTK"), so that each head's product is one contiguous matrix product.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from archlab.attention import kernels
from archlab.attention.blocks import BLOCK, attend_blocks
from archlab.attention.cache import KVCache
from archlab.attention.rules import Places, Rules, distances, visible
from archlab.layers.contract import Tokens


def attend_plain(q: Float[Array, "B H T K"], k: Float[Array, "B G S K"], v: Float[Array, "B G S C"], queries: Places,
                 keys: Places, rules: Rules = Rules()) -> Float[Array, "B H T C"]:
    """Attention with all scores at once, in at least float32; rows that see nothing give 0. G divides H; values may be
    of another size."""
    B, H, T, K = q.shape
    G = k.shape[1]
    grouped = rules.scaled(q).reshape(B, G, H // G * T, K)
    scores = jnp.einsum("BGRK,BGSK->BGRS", grouped, k).reshape(B, G, H // G, T, -1)
    scores = rules.adjust(scores, distances(queries, keys)).reshape(B, H, T, -1)
    scores = jnp.where(visible(queries, keys, rules.sight)[:, None], scores, -jnp.inf)
    if rules.sinks is not None:  # one more key, which every query sees, with a value of zero
        sink = jnp.broadcast_to(rules.sinks[:, None, None].astype(scores.dtype), (B, H, T, 1))
        scores = jnp.concatenate([scores, sink], -1)
    top = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(top))
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(scores.dtype).tiny)
    weights = weights[..., : k.shape[2]].astype(v.dtype)
    out = jnp.einsum("BGRS,BGSK->BGRK", weights.reshape(B, G, H // G * T, -1), v)
    return out.reshape(B, H, T, -1)


def attend(q: Float[Array, "B H T K"], k: Float[Array, "B G T K"], v: Float[Array, "B G T C"], places: Places,
           rules: Rules = Rules()) -> Float[Array, "B H T C"]:
    """Attention of a piece to itself, for training and prefill without a state; no T x T matrix is kept.

    Args: q, k, v: rotated already; places: of the tokens, padding last; rules: what becomes of the scores.
    """
    platform = jax.default_backend()
    if platform == "gpu" and kernels.fits_cudnn(q, v, rules):
        return kernels.attend_cudnn(q, k, v, places, rules)
    if platform == "tpu" and kernels.fits_splash(q, rules):
        return kernels.attend_splash(q, k, v, places, rules)
    return attend_blocks(q, k, v, places, places, rules)


def attend_state(q: Float[Array, "B H T K"], k: Float[Array, "B G T K"], v: Float[Array, "B G T K"], tokens: Tokens,
                 state: KVCache, rules: Rules = Rules()) -> tuple[Float[Array, "B H T K"], KVCache]:
    """Causal attention of a piece to what the cache holds and to itself; and the cache with the piece written."""
    local, slots = rules.sight.reach is not None, state.keys.shape[2]
    if not local and q.shape[2] > slots:
        raise ValueError(f"a piece of {q.shape[2]} tokens does not fit a state of max_length {slots}")
    new = state.append(k, v, tokens)
    if not local:
        keys, values, slots = new.keys.astype(q.dtype), new.values.astype(q.dtype), Places(new.segments, new.positions)
    else:  # the piece's last tokens may have pushed out of the ring what its first ones see: look at both
        ring = state if q.shape[2] <= BLOCK else state.in_order()
        keys, values = (jnp.concatenate([a.astype(q.dtype), b], 2) for a, b in ((ring.keys, k), (ring.values, v)))
        slots = Places(jnp.concatenate([ring.segments, tokens.segments], 1),
                       jnp.concatenate([ring.positions, tokens.positions], 1))
    queries = Places(tokens.segments, tokens.positions)
    if q.shape[2] <= BLOCK:
        return attend_plain(q, keys, values, queries, slots, rules), new
    if local:
        return attend_blocks(q, keys, values, queries, slots, rules), new
    stored = lambda a: a.astype(state.keys.dtype).astype(q.dtype)
    y = jax.lax.cond((state.cursor == 0).all(),  # most prefills begin a text: half of the scores need no computing
                     lambda: attend(q, stored(k), stored(v), queries, rules),
                     lambda: attend_blocks(q, keys, values, queries, slots, rules, ordered=False))
    return y, new


def attend_kept(q: Float[Array, "B H T K"], tokens: Tokens, state: KVCache,
                rules: Rules = Rules()) -> Float[Array, "B H T K"]:
    """Attention of a text's tokens, or of some of them, to the cache, which holds the keys of all the text already and
    is not written: for layers that go over a text again and share its keys and values (`Tokens.keys` = "read").

    What a query sees is told by places alone, so that tokens may be any, gathered from a row in any order. All slots
    are scored, a block of queries at a time; gradients reach the cache. A windowed layer's ring holds what its newest
    token sees: it is read by one token a row at most, which must be that one.

    Raises: ValueError where several tokens read a ring, from which keys that the first ones see were pushed out.
    """
    T, slots = q.shape[2], state.keys.shape[2]
    if T > 1 and slots == rules.sight.reach:
        raise ValueError(f"{T} tokens cannot read a ring of {slots} slots, which lacks what the first of them see: "
                         "keep a piece's keys (Tokens.keys = 'keep'), or run windowed layers one token at a time")
    args = (q, state.keys.astype(q.dtype), state.values.astype(q.dtype), Places(tokens.segments, tokens.positions),
            Places(state.segments, state.positions), rules)
    return attend_plain(*args) if T <= BLOCK else attend_blocks(*args, ordered=False)
