"""Between q k^T and the weights: who sees whom, and what is done to a score before the softmax.

Masks are derived from segments and positions block by block, and never passed.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from archlab.layers.contract import wide


class Places(NamedTuple):
    """Segments and positions [B, T] of some tokens, as in `Tokens`."""

    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"]


class Sight(NamedTuple):
    """Which tokens of its document a token sees.

    window: those fewer than so many places away; chunk: those of its own stretch of so many places, counted from the
    document's start (Llama 4's local layers); causal: none later than itself.
    """

    window: int | None = None
    chunk: int | None = None
    causal: bool = True

    @property
    def reach(self) -> int | None:
        """How many places away the farthest token in sight may be, itself included; None for any."""
        return min((n for n in (self.window, self.chunk) if n is not None), default=None)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bias", "sinks"],
                   meta_fields=["sight", "scale", "cap"])
@dataclasses.dataclass(frozen=True)
class Rules:
    """What becomes of the scores: `scale`, then the soft cap, then the bias, then the mask of `sight`.

    scale: multiplies q k^T; None for K^-0.5. cap: `cap tanh(score / cap)` (Gemma 2, arXiv:2408.00118). bias: called
    with distances [B, T, S] (query's place less key's), gives [B or 1, H, T, S]. sinks [H]: one more score per head,
    which takes its share of the softmax and gives nothing (Xiao et al. 2023, arXiv:2309.17453, as learned in gpt-oss).
    """

    sight: Sight = Sight()
    scale: float | None = None
    cap: float | None = None
    bias: Any = None
    sinks: Float[Array, "H"] | None = None

    @property
    def plain(self) -> bool:
        """Nothing but a scale and the causal mask."""
        return self.sight == Sight() and self.cap is None and self.bias is None and self.sinks is None

    def scaled(self, q: jax.Array) -> jax.Array:
        return q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def adjust(self, scores: Float[Array, "B G R T S"], distance: Int[Array, "B T S"]) -> Float[Array, "B G R T S"]:
        """Capped and biased scores, in at least float32."""
        scores = wide(scores)
        if self.cap is not None:
            scores = self.cap * jnp.tanh(scores / self.cap)
        if self.bias is not None:
            bias = self.bias(distance)
            scores = scores + bias.reshape(bias.shape[:1] + scores.shape[1:]).astype(scores.dtype)
        return scores


def distances(queries: Places, keys: Places) -> Int[Array, "B T S"]:
    """How many places each key lies behind each query; negative for later keys."""
    return queries.positions[:, :, None] - keys.positions[:, None, :]


def visible(queries: Places, keys: Places, sight: Sight = Sight()) -> Bool[Array, "B T S"]:
    """Which keys each query sees: of its own document, and in sight."""
    distance = distances(queries, keys)
    seen = (queries.segments[:, :, None] == keys.segments[:, None, :]) & (keys.segments > 0)[:, None, :]
    if sight.causal:
        seen &= distance >= 0
    if sight.window is not None:
        seen &= (distance if sight.causal else abs(distance)) < sight.window
    if sight.chunk is not None:
        seen &= queries.positions[:, :, None] // sight.chunk == keys.positions[:, None, :] // sight.chunk
    return seen
