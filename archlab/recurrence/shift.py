"""The token before: what RWKV's layers mix into every token (Peng et al. 2023, arXiv:2305.13048, section 3.1)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from archlab.layers.contract import Tokens, document_starts, pytree


@pytree
class ShiftState:
    """last [B, D]: the last real token of each row. segment [B]: its document."""

    last: Float[Array, "B D"]
    segment: Int[Array, "B"]

    @classmethod
    def zeros(cls, batch: int, channels: int, dtype) -> "ShiftState":
        return cls(jnp.zeros((batch, channels), dtype), jnp.zeros((batch,), jnp.int32))


def token_before(x: Float[Array, "B T D"], tokens: Tokens, state: ShiftState | None = None):
    """`x` one token later: zero at the first of each document. Returns it [B, T, D], and the state after the piece
    (None without one)."""
    past = ShiftState.zeros(x.shape[0], x.shape[2], x.dtype) if state is None else state
    line = jnp.concatenate([past.last[:, None].astype(x.dtype), x], 1)
    starts, segment = document_starts(tokens.segments, past.segment)
    before = jnp.where(starts[:, :, None], 0, line[:, :-1])  # padding comes last: before a token stands a real one
    if state is None:
        return before, None
    newest = tokens.real.sum(1)[:, None, None]
    last = jnp.take_along_axis(line, newest, 1)[:, 0].astype(state.last.dtype)
    return before, ShiftState(last, segment)
