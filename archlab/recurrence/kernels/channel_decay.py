"""The kernel of `channel_decay`, for decays as strong as one likes."""

import functools

import jax.numpy as jnp

from archlab.recurrence.kernels.matrix import column, dot, forgetting, places, through_chunks


def channel_decay_kernel(q, k, v, g, starts, S, read_first: bool = False, *, size: int = 64,
                         platform: str | None = None, interpret: bool = False):
    """`sequential` of channel_decay.py as a kernel, forward and backward. size, platform: as in `through_chunks`."""
    if read_first:
        q = jnp.where(starts[:, None, :, None], 0, q)  # the state before a document's first token is empty
    arrays = [q, k, v, forgetting(g, starts)]
    return through_chunks(rule_read_first if read_first else rule, arrays, S, size, platform, interpret)


def rule(S, q, k, v, g, read_first: bool = False):
    """One chunk: q, k, g [t, N], v [t, P]. read_first: y is of the state that a step finds, not of that it leaves."""
    levels = spans(g)
    y = dot(q * levels[-1][not read_first], S) + dot(scores(q, k, levels, read_first), v)
    return written(S, k, v, levels, g), y


rule_read_first = functools.partial(rule, read_first=True)


def spans(g):
    """The decays of every channel within blocks of 1, 2, 4, ... steps, up to the whole chunk.

    A decay over any stretch of steps would be a [t, s, N] array. So a chunk is halved again and again: where s lies in
    the first half of some block and t in its second, the decay is a product of two factors, one from s to the middle
    and one from there to t. All are exponentials of sums of log-decays, so none is above 1.

    Returns: for each size of block three [t, N] arrays: from the block's beginning to before step t, the same through
      step t, and from after step t to the block's end.
    """
    t, s = places(len(g))
    sums = lambda where: jnp.exp(dot(jnp.where(where, 1, 0).astype(g.dtype), g))

    def level(bits):
        block = (t >> bits) == (s >> bits)
        return sums(block & (s < t)), sums(block & (s <= t)), sums(block & (s > t))

    return [level(bits) for bits in range((len(g) - 1).bit_length() + 1)]


def scores(q, k, levels, read_first: bool):
    """[t, s]: q_t . k_s, each channel decayed over the steps s + 1 to t, or, if `read_first`, to t - 1; 0 where s > t,
    and there at t too."""
    t, s = places(len(q))
    out = jnp.zeros(t.shape, q.dtype) if read_first else jnp.where(t == s, (q * k).sum(1, keepdims=True), 0)
    for bits, (to, through, rest) in enumerate(levels[:-1]):
        across = ((t >> bits) == (s >> bits) + 1) & (((t >> bits) & 1) == 1)
        out = out + jnp.where(across, dot(q * (to if read_first else through), k * rest, "nt"), 0)
    return out


def written(S, k, v, levels, g):
    """The state after a chunk that writes v at k."""
    return column(jnp.exp(g.sum(0, keepdims=True))) * S + dot(k * levels[-1][2], v, "tn")
