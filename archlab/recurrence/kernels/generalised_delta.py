"""The kernel of `generalised_delta`: what all steps of a chunk recall, by one triangular inverse.

With r_t = a_t S_{t-1} what step t recalls, and (a_t ~ b_s) the product of the two, each channel decayed over the steps
between s and t:

    r_t - sum_{s < t} (a_t ~ b_s) r_s = a_t ~ S_0 + sum_{s < t} (a_t ~ k_s) v_s
"""

import jax.numpy as jnp

from archlab.recurrence.kernels.channel_decay import scores, spans, written
from archlab.recurrence.kernels.matrix import dot, forgetting, inverse, through_chunks


def generalised_delta_kernel(q, k, v, a, b, g, starts, S, *, size: int = 64, platform: str | None = None,
                             interpret: bool = False):
    """`sequential` of generalised_delta.py as a kernel, forward and backward. size, platform: as in
    `through_chunks`."""
    a = jnp.where(starts[:, None, :, None], 0, a)  # a document's first token finds an empty state
    return through_chunks(rule, [q, k, v, a, b, forgetting(g, starts)], S, size, platform, interpret)


def rule(S, q, k, v, a, b, g):
    """One chunk: q, k, a, b, g [t, N], v [t, P]."""
    levels = spans(g)
    to, through, _ = levels[-1]
    recalled = dot(a * to, S) + dot(scores(a, k, levels, True), v)
    r = dot(inverse(-scores(a, b, levels, True)), recalled)
    y = dot(q * through, S) + dot(scores(q, k, levels, False), v) + dot(scores(q, b, levels, False), r)
    return written(S, k, v, levels, g) + dot(b * levels[-1][2], r, "tn"), y
