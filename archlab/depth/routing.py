"""Which tokens of a row may pass where only a share of them may: pure functions, and the words for it.

    capacity  what a config says: a number in (0, 1]
    share     the same as an exact fraction, because two roundings of one budget (here, and in the size of a cache) must
              agree; in training, of a row's tokens
    room      the share with its slack: of a document's tokens so far, where nothing looks ahead
    budget    a share of a count, rounded down
    passed    how many tokens of a document have used its budget
    places    of tokens in their documents, counted from 0
    slots     for how many tokens of a row there is space, in a gathered row or in a cache
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from archlab.layers.config import require
from archlab.layers.sharding import per_shard

DENOMINATOR = 1000  # of shares: budgets then fit int32 up to two million tokens
FREE = 2**29  # a bound that nothing reaches, twice which fits int32


def as_share(capacity: float) -> Fraction:
    """The nearest fraction with a denominator of at most 1000: 0.6666667 is 2/3."""
    return Fraction(float(capacity)).limit_denominator(DENOMINATOR)


def check_share(config, field: str, capacity: float) -> None:
    """Raises ValueError where `capacity`, of a config's field, is no share that lets tokens pass."""
    each = "" if getattr(config, field) is capacity else "each "
    require(0 < capacity <= 1, config, field, f"{each}must lie in (0, 1]")
    require(as_share(capacity) > 0, config, field,
            f"a share that rounds to no token: {each}must be at least 1/{DENOMINATOR}")


def check_slack(config) -> None:
    """Raises ValueError where a config's `slack` is no share."""
    require(0 <= config.slack < math.inf, config, "slack", "must be 0 (none) or positive, and finite")


def with_slack(share: Fraction, slack: float) -> Fraction:
    """The share and `slack` of it more, at most 1. Slack multiplies: any that is added would let every short document
    have a token more than its share, and a row packed with them would have no bound but its length."""
    return as_share(min(1.0, float(share) * (1 + slack)))


def budget(share: Fraction, count):
    """How many of `count` tokens may pass: `floor(share * count)`; `count` an int or an int32 array.

    Rounded down, the budgets of any documents never exceed the budget of their joint length: whatever is packed into
    a row of T tokens, `budget(share, T)` slots hold all that pass.
    """
    return share.numerator * count // share.denominator


def slots_for(share: Fraction, length: int, held: int | None = None) -> int:
    """For how many tokens of a row of `length` there must be space in a gathered row. held: how many a state has space
    for, where there is one: a piece may then spend what its document has saved."""
    return max(1, budget(share, length)) if held is None else min(length, held)


def choose_best(scores: Float[Array, "B T"], candidates: Bool[Array, "B T"], most: Fraction,
                counts: Int[Array, "B"]) -> Bool[Array, "B T"]:
    """Expert choice: of each row's candidates those with the highest scores, `counts` [B] of them (at least one, and
    all where they are fewer). It looks ahead. most: the greatest share of a row's places that `counts` may be."""
    places = max(1, budget(most, scores.shape[1]))
    # per shard: left to the compiler, a sort gathers all rows of the batch on every device
    best = per_shard(lambda scores: jax.lax.top_k(scores, places)[1], "BT", "B.")(
        jnp.where(candidates, scores, -jnp.inf))
    within = jnp.arange(best.shape[1]) < jnp.maximum(counts, 1)[:, None]
    row = jnp.arange(best.shape[0])[:, None]
    return candidates & jnp.zeros_like(candidates).at[row, best].set(within)


def choose_within_budget(wish: Bool[Array, "B T"], share: Fraction, places: Int[Array, "B T"],
                         real: Bool[Array, "B T"], passed: Int[Array, "B"]):
    """First come, first served, causally: a token passes if it wishes to and its document's budget has room.

    Args: places: of each token in its document, counted from 0 where a document begins; passed [B]: how many tokens
      of the row's last document passed before this piece.
    Returns: who passes [B, T], and `passed` after the piece.

    The number passed obeys `s_t = min(s_(t-1) + wish_t, budget_t)`. Functions `s -> min(s + add, cap)` compose to
    such functions, so that one associative scan finds every s; a document's first token forgets s by a huge `add`.
    """
    starts = real & (places == 0)
    cap = jnp.where(real, budget(share, places + 1), FREE)
    add = jnp.where(starts, FREE, wish.astype(jnp.int32))
    cap = jnp.where(starts, jnp.minimum(cap, wish.astype(jnp.int32)), cap)

    def compose(f, g):
        return jnp.minimum(f[0] + g[0], FREE), jnp.minimum(f[1] + g[0], g[1])

    add, cap = jax.lax.associative_scan(compose, (add, cap), axis=1)
    after = jnp.minimum(passed[:, None] + add, cap)
    before = jnp.where(starts, 0, jnp.concatenate([passed[:, None], after[:, :-1]], axis=1))
    return after > before, after[:, -1]
