"""Matrix states that are corrected along one direction, at another, while each key channel decays at its own rate.

    S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t S_{t-1})^T + k_t v_t^T        y_t = q_t S_t

RWKV-7's generalised delta rule (Peng et al. 2025, arXiv:2503.14456, section 4): a transition that is diagonal plus rank
one. There a = -kk, b = kk * rate, with kk of length 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from archlab.layers.contract import Tokens
from archlab.recurrence.forms import Form, Sequential
from archlab.recurrence.memory import MemoryState, dot, remember, step_by_step


def generalised_delta(q: Float[Array, "B H T N"], k: Float[Array, "B H T N"], v: Float[Array, "B H T P"],
                      a: Float[Array, "B H T N"], b: Float[Array, "B H T N"], log_decay: Float[Array, "B H T N"],
                      tokens: Tokens, state: MemoryState, form: Form | None = None):
    """The recurrence over a piece.

    Args: a: where the state is read for the correction; b: where it is written; log_decay: g, not above 0.
    Returns: y [B, H, T, P] in the dtype of the state, and the state after the piece.
    """
    run = sequential
    return remember(run, "BHTN BHTN BHTN", q, k, v, a, b, log_decay, tokens=tokens, state=state)


def sequential(q, k, v, a, b, g, starts, S):
    """Step by step: the definition."""
    def step(S, q, k, v, a, b, g):
        recalled = dot("BHN,BHNP->BHP", a, S)
        S = jnp.exp(g)[..., None] * S + b[..., :, None] * recalled[..., None, :] + k[..., :, None] * v[..., None, :]
        return S, dot("BHN,BHNP->BHP", q, S)

    return step_by_step(step, starts, S, q, k, v, a, b, g)
