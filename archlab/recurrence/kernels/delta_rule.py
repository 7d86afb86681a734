"""The kernel of `delta_rule`: what all steps of a chunk write, by one triangular inverse (arXiv:2412.06464, section 3).

With w_t = beta_t (v_t - k_t S'_t) the value that step t writes at its key, and D_ts the decay between the two steps:

    w_t + beta_t sum_{s < t} D_ts (k_t . k_s) w_s = beta_t (v_t - D_t0 k_t S_0)
"""

import jax.numpy as jnp

from archlab.recurrence.kernels.matrix import column, decays, dot, forgetting, inverse, places, through_chunks


def delta_rule_kernel(q, k, v, beta, g, starts, S, *, size: int = 64, platform: str | None = None,
                      interpret: bool = False):
    """`sequential` of delta_rule.py as a kernel, forward and backward. size, platform: as in `through_chunks`."""
    return through_chunks(rule, [q, k, v, beta, forgetting(g, starts)], S, size, platform, interpret)


def rule(S, q, k, v, beta, g):
    """One chunk: q, k [t, N], v [t, P], beta, g [1, t]."""
    before, between, after, whole = decays(g)
    t, s = places(len(k))
    beta = column(beta)
    seen = jnp.where(s < t, beta * between * dot(k, k, "nt"), 0)
    w = dot(inverse(seen), beta * (v - before * dot(k, S)))
    y = before * dot(q, S) + dot(between * dot(q, k, "nt"), w)
    return whole * S + dot(after * k, w, "tn"), y
