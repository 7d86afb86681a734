"""Diagonal recurrences: every channel is a leaky sum of its own.

    h_t = a_t h_{t-1} + b_t

S5 (Smith et al. 2022, arXiv:2208.04933), RG-LRU (De et al. 2024, arXiv:2402.19427), minGRU (arXiv:2410.01201), RWKV-4
(arXiv:2305.13048). Real or complex.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from archlab.layers.contract import Tokens, document_starts, pytree
from archlab.layers.sharding import per_shard
from archlab.recurrence.forms import Form


@pytree
class DiagonalState:
    """hidden [B, F]: h of each row's last document, at least float32. segment [B]: that document."""

    hidden: Inexact[Array, "B F"]
    segment: Int[Array, "B"]

    @classmethod
    def zeros(cls, batch: int, channels: int, dtype) -> "DiagonalState":
        """dtype: complex for a complex state; float32 at least."""
        dtype = jnp.promote_types(dtype, jnp.float32)
        return cls(jnp.zeros((batch, channels), dtype), jnp.zeros((batch,), jnp.int32))


def diagonal(a: Inexact[Array, "B T F"], b: Inexact[Array, "B T F"], tokens: Tokens, state: DiagonalState,
             form: Form | None = None):
    """The recurrence over a piece.

    Args: a: decays, of size at most 1; b: what is added. Both are without effect at padding.
    Returns: h [B, T, F] in the dtype of the state, and the state after the piece.
    """
    starts, last = document_starts(tokens.segments, state.segment)
    real = tokens.real[:, :, None]
    a = jnp.where(starts[:, :, None], 0, jnp.where(real, a, 1)).astype(state.hidden.dtype)
    b = jnp.where(real, b, 0).astype(state.hidden.dtype)
    h, hidden = per_shard(sequential, "BTF BTF BF", "BTF BF")(a, b, state.hidden)
    return h, DiagonalState(hidden, last)


def sequential(a, b, h):
    """Step by step: the definition."""
    def step(h, now):
        h = now[0] * h + now[1]
        return h, h

    if a.shape[1] == 1:
        h, _ = step(h, (a[:, 0], b[:, 0]))
        return h[:, None], h
    last, h = jax.lax.scan(step, h, (jnp.swapaxes(a, 0, 1), jnp.swapaxes(b, 0, 1)))
    return jnp.swapaxes(h, 0, 1), last
