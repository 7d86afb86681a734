"""Matrix states whose every key channel decays at a rate of its own.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        y_t = q_t S_t
    with a bonus u:                                 y_t = q_t (S_{t-1} + diag(u) k_t v_t^T)

Gated linear attention (Yang et al. 2023, arXiv:2312.06635, section 4), HGRN2 (arXiv:2404.07904), and with the bonus
RWKV-5 and RWKV-6 (arXiv:2404.05892), which read before they forget and write.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from archlab.layers.contract import Tokens
from archlab.recurrence.forms import Form, Sequential
from archlab.recurrence.memory import MemoryState, dot, remember, step_by_step


def channel_decay(q: Float[Array, "B H T N"], k: Float[Array, "B H T N"], v: Float[Array, "B H T P"],
                  log_decay: Float[Array, "B H T N"], tokens: Tokens, state: MemoryState,
                  bonus: Float[Array, "H N"] | None = None, form: Form | None = None):
    """The recurrence over a piece.

    Args: log_decay: g, not above 0; as strong as one likes. bonus: u.
    Returns: y [B, H, T, P] in the dtype of the state, and the state after the piece.
    """
    run = sequential
    if bonus is None:
        return remember(run, "BHTN", q, k, v, log_decay, tokens=tokens, state=state)
    # Reading before the write is reading the state of the token before: what the token itself adds is known.
    run = functools.partial(run, before=True)
    y, state = remember(run, "BHTN", q, k, v, log_decay, tokens=tokens, state=state)
    own = (q * k).astype(y.dtype) * bonus[:, None, :].astype(y.dtype)
    return y + own.sum(-1, keepdims=True) * v.astype(y.dtype), state


def sequential(q, k, v, g, starts, S, before: bool = False):
    """Step by step: the definition. before: read S_{t-1} instead of S_t."""
    def step(S, q, k, v, g):
        new = jnp.exp(g)[..., None] * S + k[..., :, None] * v[..., None, :]
        return new, dot("BHN,BHNP->BHP", q, S if before else new)

    return step_by_step(step, starts, S, q, k, v, g)
