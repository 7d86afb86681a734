"""A capacity: the number of tokens an expert takes of one sequence. What comes later is left out (GShard,
arXiv:2006.16668, section 2.2; Switch Transformer, arXiv:2101.03961, section 2.2).

The experts then work on buffers of a fixed size, which is the fastest form and bounds what devices must exchange. The
price: a choice that finds its expert full adds nothing to the token, unless it may go on to the token's next best.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from archlab.experts.dispatch import plan, rank_in_group, through
from archlab.layers.config import Config, near, require

ORDERS = ("time", "choice", "priority")


class Capacity(Config):
    """In the training form an expert takes `min(n, ceil(factor * k * n / E))` tokens of a sequence with n real ones.

    The count is that of one sequence, so neither the mesh nor the micro-batch changes what is dropped; and of its real
    tokens, so neither does padding. It knows how long the sequence will be, and documents packed into a row share its
    room: a look ahead, however slight, that inference does not have. All k choices count: whatever k is, a factor of 1
    is room for a perfectly balanced choice (in GShard's code it is not: twice its factor is ours for k = 2).

    rows: how many consecutive rows of the batch (or micro-batch, which takes others) share their room. reroute: how
    many times a choice that finds its expert full asks the token's next best one ("no token left behind": Switch,
    appendix B); it queues behind all who asked before. order: who comes first: tokens in order of "time", so that who
    found room owes it to no later token (without reroute); all first choices before all second ones ("choice", GShard);
    or among these the tokens of highest weight ("priority", V-MoE's batch-prioritised routing, arXiv:2106.05974,
    section 3.1).
    """

    factor: float
    rows: int = 1
    reroute: int = 0
    order: str = "time"

    def __post_init__(self):
        require(self.factor > 0, self, "factor", "must be positive (for no dropping leave the capacity out: None)")
        require(self.rows >= 1, self, "rows", "must be at least 1")
        require(self.reroute >= 0, self, "reroute", "must be 0 (dropped at once) or positive")
        require(self.order in ORDERS, self, "order", near(str(self.order), ORDERS))

    def room(self, k: int, experts: int, length: int) -> np.ndarray:
        """How many tokens an expert takes, for sequences of 0 to `length` real tokens: int32 [length + 1]."""
        n = np.arange(length + 1)
        wanted = np.ceil(self.factor * k * n / experts - 1e-9)  # 1e-9: round-off is no token
        return np.minimum(n, wanted).astype(np.int32)

    def fit(self, experts: Int[Array, "B T k"], gates: Float[Array, "B T E"], room: Int[Array, "B"]):
        """Who finds room.

        Args: experts: E for nobody. gates: by which a token's next best expert is known, and its priority.
        Returns: what each choice asked for in the end, and the same with "nobody" where that was full; [B, T, k].
        """
        E, rank = gates.shape[-1], self._queue(experts, gates)
        asked = experts
        kept = jnp.where(rank(asked, jnp.zeros(room.shape + (E,), jnp.int32)) < room[:, None, None], asked, E)
        tried = _hits(asked, E).any(2)
        for _ in range(self.reroute):
            over = (kept == E) & (asked < E)
            merit, others = jax.lax.top_k(jnp.where(tried, -jnp.inf, gates), min(experts.shape[2], E))
            others = jnp.where(merit > 0, others, E).astype(asked.dtype)  # none of weight 0
            turn = jnp.clip(jnp.cumsum(over, 2) - 1, 0, others.shape[2] - 1)
            new = jnp.where(over, jnp.take_along_axis(others, turn, 2), E)
            found = rank(new, _hits(kept, E).sum((1, 2))) < room[:, None, None]
            kept, asked = jnp.where(over & found, new, kept), jnp.where(new < E, new, asked)
            tried |= _hits(new, E).any(2)
        return asked, kept

    def _queue(self, experts, gates):
        """A function from choices, and how many each expert has taken [B, E], to each choice's place in its queue."""
        B, T, k = experts.shape
        order = jnp.broadcast_to(jnp.arange(T), (B, T))
        if self.order == "priority":
            order = jnp.argsort(-jax.lax.stop_gradient(gates.max(-1)), axis=1, stable=True)
        by_choice = self.order != "time"  # all first choices, then all second ones

        def rank(wanted, taken):
            E = taken.shape[-1]
            lined = jnp.take_along_axis(wanted, order[:, :, None], 1)
            lined = lined.swapaxes(1, 2) if by_choice else lined
            group = jnp.where(lined < E, lined * B + jnp.arange(B)[:, None, None], E * B)
            place = rank_in_group(group.reshape(-1), E * B)[0].reshape(lined.shape)
            place = place.swapaxes(1, 2) if by_choice else place
            place = jnp.zeros_like(place).at[jnp.arange(B)[:, None], order].set(place, unique_indices=True)
            row = jnp.arange(B)[:, None, None]
            return jnp.where(wanted < E, place + taken[row, jnp.minimum(wanted, E - 1)], 0)

        return rank


def _hits(experts, count: int):
    return experts[..., None] == jnp.arange(count)


def with_capacity(x: Float[Array, "B T D"], experts: Int[Array, "B T k"], weights: Float[Array, "B T k"],
                  count: int, capacity: int, compute: Callable) -> Float[Array, "B T D"]:
    """`capacity` rows for each of `count` experts and each sequence; `experts` must have passed `Capacity.fit`.

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
