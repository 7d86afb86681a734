"""The attention core: softmax(Q K^T / sqrt(K)) V under the masks that tokens imply.

`attend` chooses the best form for the platform, `attend_state` does so where there is a cache; `attend_plain`, which
keeps every score, is the oracle they are tested against. Heads come before time ("BHTK"), so that each head's product
is one contiguous matrix product.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from archlab.attention import kernels
from archlab.attention.blocks import BLOCK, Places, attend_blocks
from archlab.attention.cache import KVCache
from archlab.attention.masks import visible
from archlab.layers.contract import Tokens, wide


def attend_plain(q: Float[Array, "B H T K"], k: Float[Array, "B G S K"], v: Float[Array, "B G S K"],
                 mask: Bool[Array, "B T S"]) -> Float[Array, "B H T K"]:
    """Attention with all scores at once, in at least float32; rows that see nothing give 0. G divides H."""
    B, H, T, K = q.shape
    G = k.shape[1]
    grouped = q.reshape(B, G, H // G * T, K)
    scores = wide(jnp.einsum("BGRK,BGSK->BGRS", grouped, k)).reshape(B, H, T, -1) * K**-0.5
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    top = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(top))
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(scores.dtype).tiny)
    out = jnp.einsum("BGRS,BGSK->BGRK", weights.astype(v.dtype).reshape(B, G, H // G * T, -1), v)
    return out.reshape(B, H, T, K)


def attend(q: Float[Array, "B H T K"], k: Float[Array, "B G T K"], v: Float[Array, "B G T K"],
           segments: Int[Array, "B T"], positions: Int[Array, "B T"],
           window: int | None = None) -> Float[Array, "B H T K"]:
    """Causal attention of a piece to itself, for training and prefill without a state; no T x T matrix is kept.

    Args: q, k, v: rotated already; segments, positions: as in `Tokens`, padding last; window: None, or how many
      places back (itself included) a token sees.
    """
    platform = jax.default_backend()
    if window is None and platform == "gpu" and kernels.fits_cudnn(q):
        return kernels.attend_cudnn(q, k, v, segments, positions)
    if window is None and platform == "tpu" and kernels.fits_splash(q):
        return kernels.attend_splash(q, k, v, segments)
    places = Places(segments, positions)
    return attend_blocks(q, k, v, places, places, window)


def attend_state(q: Float[Array, "B H T K"], k: Float[Array, "B G T K"], v: Float[Array, "B G T K"], tokens: Tokens,
                 state: KVCache, window: int | None = None) -> tuple[Float[Array, "B H T K"], KVCache]:
    """Attention of a piece to what the cache holds and to itself; and the cache with the piece written."""
    new = state.append(k, v, tokens)
    if window is None:
        keys, values, slots = new.keys.astype(q.dtype), new.values.astype(q.dtype), Places(new.segments, new.positions)
    else:  # the piece's last tokens may have pushed out of the ring what its first ones see: look at both
        ring = state if q.shape[2] <= BLOCK else state.in_order()
        keys, values = (jnp.concatenate([a.astype(q.dtype), b], 2) for a, b in ((ring.keys, k), (ring.values, v)))
        slots = Places(jnp.concatenate([ring.segments, tokens.segments], 1),
                       jnp.concatenate([ring.positions, tokens.positions], 1))
    queries = Places(tokens.segments, tokens.positions)
    if q.shape[2] <= BLOCK:
        return attend_plain(q, keys, values, visible(*queries, *slots, window)), new
    if window is not None:
        return attend_blocks(q, keys, values, queries, slots, window), new
    stored = lambda a: a.astype(state.keys.dtype).astype(q.dtype)
    y = jax.lax.cond((state.cursor == 0).all(),  # most prefills begin a text: half of the scores need no computing
                     lambda: attend(q, stored(k), stored(v), tokens.segments, tokens.positions),
                     lambda: attend_blocks(q, keys, values, queries, slots, ordered=False))
    return y, new
