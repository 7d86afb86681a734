"""Attention by the platforms' own kernels: cuDNN on GPUs, splash attention (a Pallas kernel of JAX) on TPUs.

Both keep no T x T scores. `fits_cudnn` and `fits_splash` say which shapes they take; the rest runs as on a CPU.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from archlab.attention.masks import visible
from archlab.layers.sharding import per_shard

SPLASH_BLOCK = 512  # queries and keys per block


def fits_cudnn(q: jax.Array) -> bool:
    """Half precision and heads of at most 128, in multiples of 8."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def attend_cudnn(q: Float[Array, "B H T K"], k: Float[Array, "B G T K"], v: Float[Array, "B G T K"],
                 segments: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B H T K"]:
    """Causal attention of a piece to itself. Rows of one document, padding after it, need no mask in memory; packed
    documents get one of T x T bits a row, shared by all heads."""
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    lengths = (segments > 0).sum(1, dtype=jnp.int32)
    run = functools.partial(jax.nn.dot_product_attention, q, k, v, implementation="cudnn")

    def alone():
        return run(is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths)

    def packed():
        return run(mask=visible(segments, positions, segments, positions)[:, None])

    one_document = ((segments == segments[:, :1]) | (segments == 0)).all()
    out = jnp.swapaxes(jax.lax.cond(one_document, alone, packed), 1, 2)
    return jnp.where(segments[:, None, :, None] > 0, out, 0)


def fits_splash(q: jax.Array) -> bool:
    """Whole tiles: a length in multiples of 128, and heads in multiples of 64."""
    return q.shape[2] % 128 == 0 and q.shape[3] % 64 == 0


def attend_splash(q: Float[Array, "B H T K"], k: Float[Array, "B G T K"], v: Float[Array, "B G T K"],
                  segments: Int[Array, "B T"], interpret: bool = False) -> Float[Array, "B H T K"]:
    """Causal attention of a piece to itself within its documents. interpret: run without a TPU, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def rows(q, k, v, segments):
        heads, length, size = q.shape[1:]
        block = next(b for b in (SPLASH_BLOCK, 256, 128) if length % b == 0)
        sizes = splash.BlockSizes(**dict.fromkeys(
            ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
             "block_q_dq", "block_kv_dq"), block))
        mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
        kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        one = lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(ids, ids))
        return jax.vmap(one)(q * size**-0.5, k, v, segments)

    repeat = lambda a: jnp.repeat(a, q.shape[1] // a.shape[1], axis=1)  # the kernel wants as many key heads as queries
    out = per_shard(rows, "BHTK BHTK BHTK BT", "BHTK")(q, repeat(k), repeat(v), segments)
    return jnp.where(segments[:, None, :, None] > 0, out, 0)
