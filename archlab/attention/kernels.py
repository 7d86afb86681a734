"""Attention by the platforms' own kernels: cuDNN on GPUs, splash attention (a Pallas kernel of JAX) on TPUs.

Both keep no T x T scores. `fits_cudnn` and `fits_splash` say what they take; the rest runs as on a CPU.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from archlab.attention.rules import Places, Rules, visible
from archlab.layers.sharding import per_shard

SPLASH_BLOCK = 512  # queries and keys per block


def fits_cudnn(q: jax.Array, v: jax.Array, rules: Rules) -> bool:
    """Half precision and heads of at most 128, in multiples of 8, their values no larger than their keys; causal, with
    nothing done to the scores."""
    size = q.shape[-1]
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return rules.plain and half and size <= 128 and size % 8 == 0 and v.shape[-1] <= size


def attend_cudnn(q: Float[Array, "B H T K"], k: Float[Array, "B G T K"], v: Float[Array, "B G T C"], places: Places,
                 rules: Rules) -> Float[Array, "B H T C"]:
    """Causal attention of a piece to itself. Rows of one document, padding after it, need no mask in memory; packed
    documents get one of T x T bits a row, shared by all heads."""
    size = v.shape[-1]
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, q.shape[-1] - size)])  # the kernel wants values of the keys' size
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    segments = places.segments
    lengths = (segments > 0).sum(1, dtype=jnp.int32)
    run = functools.partial(jax.nn.dot_product_attention, q, k, v, scale=rules.scale, implementation="cudnn")

    def alone():
        return run(is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths)

    def packed():
        return run(mask=visible(places, places)[:, None])

    one_document = ((segments == segments[:, :1]) | (segments == 0)).all()
    out = jnp.swapaxes(jax.lax.cond(one_document, alone, packed), 1, 2)[..., :size]
    return jnp.where(segments[:, None, :, None] > 0, out, 0)


def fits_splash(q: jax.Array, rules: Rules) -> bool:
    """Whole tiles: a length in multiples of 128, and heads in multiples of 64; a window and a soft cap may be there."""
    known = rules.bias is None and rules.sinks is None and rules.sight.chunk is None and rules.sight.causal
    return known and q.shape[2] % 128 == 0 and q.shape[3] % 64 == 0


def attend_splash(q: Float[Array, "B H T K"], k: Float[Array, "B G T K"], v: Float[Array, "B G T C"], places: Places,
                  rules: Rules, interpret: bool = False) -> Float[Array, "B H T C"]:
    """Causal attention of a piece to itself within its documents. interpret: run without a TPU, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def rows(q, k, v, segments):
        heads, length, _ = q.shape[1:]
        window = rules.sight.window
        block = next(b for b in (SPLASH_BLOCK, 256, 128) if length % b == 0)
        sizes = splash.BlockSizes(**dict.fromkeys(
            ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
             "block_q_dq", "block_kv_dq"), block))
        square = (length, length)
        seen = splash.CausalMask(square) if window is None else splash.LocalMask(square, (window - 1, 0), 0)
        kernel = splash.make_splash_mha(splash.MultiHeadMask([seen] * heads), block_sizes=sizes, head_shards=1,
                                        q_seq_shards=1, attn_logits_soft_cap=rules.cap, interpret=interpret)
        one = lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(ids, ids))
        return jax.vmap(one)(rules.scaled(q), k, v, segments)

    repeat = lambda a: jnp.repeat(a, q.shape[1] // a.shape[1], axis=1)  # the kernel wants as many key heads as queries
    out = per_shard(rows, "BHTK BHTK BHTK BT", "BHTK")(q, repeat(k), repeat(v), places.segments)
    return jnp.where(places.segments[:, None, :, None] > 0, out, 0)
