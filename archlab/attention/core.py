"""The attention core: softmax(Q K^T / sqrt(K)) V under the masks that tokens imply.

`attend` chooses the best form for the platform; `attend_plain`, which keeps every score, is the oracle it is tested
against. Heads come before time ("BHTK"), so that each head's product is one contiguous matrix product.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from archlab.layers.contract import wide

BLOCK = 128  # query rows per block on a CPU: a block's scores stay in the second-level cache


def visible(query_segments: Int[Array, "B T"], query_positions: Int[Array, "B T"], key_segments: Int[Array, "B S"],
            key_positions: Int[Array, "B S"], window: int | None = None) -> Bool[Array, "B T S"]:
    """Which keys each query sees: those of its own document, not later, and fewer than `window` places back."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments > 0)[:, None, :] & (distance >= 0)
    return seen if window is None else seen & (distance < window)


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
    if window is not None and window < q.shape[2]:
        return _attend_window(q, k, v, segments, positions, window)
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        return _attend_cudnn(q, k, v, segments, positions, window)
    return _attend_blocks(q, k, v, segments, positions, window)


def _attend_blocks(q, k, v, segments, positions, window: int | None = None, block: int = BLOCK):
    """Unrolled blocks of queries, each against the keys up to its end; scores are recomputed in the backward pass.

    A window may matter even where it is as long as the piece: tokens that a router gathered stand close together and
    are far apart.
    """
    T = q.shape[2]
    block = max(block, -(-T // 32))  # at most 32 blocks: compile time grows with their number

    outs = []
    for start in range(0, T, block):
        end = min(start + block, T)
        outs.append(_attend_block(q[:, :, start:end], k[:, :, :end], v[:, :, :end], segments[:, start:end],
                                  positions[:, start:end], segments[:, :end], positions[:, :end], window))
    return jnp.concatenate(outs, axis=2)


@jax.checkpoint  # one function for all layers: what was traced for the first serves the others
def _attend_block(q, k, v, query_segments, query_positions, key_segments, key_positions, window):
    return attend_plain(q, k, v, visible(query_segments, query_positions, key_segments, key_positions, window))


def _attend_window(q, k, v, segments, positions, window: int):
    """Blocks of `window` queries, each against its own block and the one before: cost O(T window)."""
    T = q.shape[2]
    blocks = -(-T // window)
    pad = blocks * window - T
    cut = lambda a, axis: jnp.moveaxis(
        jnp.pad(a, [(0, pad if i == axis else 0) for i in range(a.ndim)])
        .reshape(a.shape[:axis] + (blocks, window) + a.shape[axis + 1:]), axis, 0)
    with_previous = lambda a, axis: jnp.concatenate([jnp.pad(a, [(1, 0)] + [(0, 0)] * (a.ndim - 1))[:-1], a], axis)
    q, k, v = (cut(a, 2) for a in (q, k, v))
    segments, positions = cut(segments, 1), cut(positions, 1)

    @jax.checkpoint
    def one(_, piece):
        q, k, v, qs, qp, ks, kp = piece
        return None, attend_plain(q, k, v, visible(qs, qp, ks, kp, window))

    pieces = (q, with_previous(k, 3), with_previous(v, 3), segments, positions,
              with_previous(segments, 2), with_previous(positions, 2))
    _, out = jax.lax.scan(one, None, pieces)
    out = jnp.moveaxis(out, 0, 2)
    return out.reshape(out.shape[:2] + (blocks * window,) + out.shape[4:])[:, :, :T]


def _attend_cudnn(q, k, v, segments, positions, window):
    time_major = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    mask = visible(segments, positions, segments, positions, window)[:, None]
    out = jax.nn.dot_product_attention(time_major(q), time_major(k), time_major(v), mask=mask, implementation="cudnn")
    return jnp.where(segments[:, None, :, None] > 0, time_major(out), 0)
