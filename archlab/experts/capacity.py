"""A capacity: the number of tokens an expert takes of one sequence. What comes later is left out (GShard,
arXiv:2006.16668, section 2.2; Switch Transformer, arXiv:2101.03961, section 2.2).

The experts then work on buffers of a fixed size, which is the fastest form and bounds what devices must exchange. The
price: a choice that finds its expert full adds nothing to the token.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from archlab.experts.dispatch import Experts, einsum, plan, rank_in_group, through


def rows_per_expert(factor: float, k: int, experts: int, length: int) -> np.ndarray:
    """How many tokens an expert takes of a sequence with n real ones: `min(n, ceil(factor * k * n / E))`.

    The count is that of one sequence, so neither the mesh nor the micro-batch changes what is dropped; and of its real
    tokens, so neither does padding. All k choices count: whatever k is, a factor of 1 is room for a perfectly balanced
    choice.

    Returns: int32 [length + 1], for n from 0 to length.
    """
    n = np.arange(length + 1)
    return np.minimum(n, np.ceil(factor * k * n / experts - 1e-9)).astype(np.int32)  # 1e-9: round-off is no token


def fit(experts: Int[Array, "B T k"], count: int, room: Int[Array, "B"]) -> Int[Array, "B T k"]:
    """The choices, with "nobody" in the place of those that find their expert full in their sequence.

    Args: room [B]: how many tokens an expert takes. Tokens queue in order of time (in GShard all second choices come
    after all first ones, by which a later token can push an earlier one out: a look into the future).
    """
    asks = (experts[..., None] == jnp.arange(count)).any(2)  # [B, T, E]
    before = jnp.cumsum(asks, axis=1) - asks
    rank = jnp.take_along_axis(before, jnp.minimum(experts, count - 1), axis=2)
    return jnp.where(rank < room[:, None, None], experts, count)


def with_capacity(x: Float[Array, "B T D"], experts: Int[Array, "B T k"], weights: Float[Array, "B T k"],
                  count: int, capacity: int, compute: Callable) -> Float[Array, "B T D"]:
    """`capacity` rows for each of `count` experts and each sequence; `experts` must have passed `fit`.

    Args: compute: from a buffer [E, B * capacity, D] to one of the same shape (`each_expert`).
    """
    (B, _, k), D = experts.shape, x.shape[-1]
    group = jnp.where(experts < count, experts * B + jnp.arange(B)[:, None, None], count * B).reshape(-1)
    rank, _ = rank_in_group(group, count * B)
    R = count * B * capacity
    rows = jnp.minimum(group * capacity + rank, R)
    buffer = lambda x: compute(x.reshape(count, B * capacity, D)).reshape(R, D)
    y = through(plan(rows, R), x.reshape(-1, D), weights.reshape(-1, k), buffer)
    return y.reshape(x.shape)


def each_expert(buffer: Float[Array, "E R D"], params: Experts) -> Float[Array, "E R D"]:
    """Every expert on rows of its own."""
    return params(buffer, lambda x, w: einsum("erd,edf->erf", x, w))
