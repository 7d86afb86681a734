"""The kernel of `scalar_decay`: Mamba-2's chunk (arXiv:2405.21060, section 6), whose scores never leave the chip."""

from archlab.recurrence.kernels.matrix import decays, dot, forgetting, through_chunks


def scalar_decay_kernel(q, k, v, g, starts, S, *, size: int = 64, platform: str | None = None, interpret: bool = False):
    """`sequential` of scalar_decay.py as a kernel, forward and backward. size, platform: as in `through_chunks`."""
    return through_chunks(rule, [q, k, v, forgetting(g, starts)], S, size, platform, interpret)


def rule(S, q, k, v, g):
    """One chunk: q, k [t, N], v [t, P], g [1, t]."""
    before, between, after, whole = decays(g)
    y = before * dot(q, S) + dot(between * dot(q, k, "nt"), v)
    return whole * S + dot(after * k, v, "tn"), y
