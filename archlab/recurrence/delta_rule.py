"""Matrix states that are corrected: what the key recalls is replaced by a mix of it and the new value.

    S'_t = exp(g_t) S_{t-1}        S_t = S'_t + beta_t k_t (v_t - k_t S'_t)^T        y_t = q_t S_t

DeltaNet (Schlag et al. 2021, arXiv:2102.11174; in parallel: Yang et al. 2024, arXiv:2406.06484) without decay, Gated
DeltaNet (arXiv:2412.06464) with one number per head and token. Keys of length 1 and beta up to 1 never overshoot; beta
up to 2 lets the transition's eigenvalue along the key be negative (arXiv:2411.12537).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from archlab.layers.contract import Tokens
from archlab.recurrence.forms import Form, Sequential
from archlab.recurrence.memory import MemoryState, dot, per_head, remember, step_by_step


def delta_rule(q: Float[Array, "B G T N"], k: Float[Array, "B G T N"], v: Float[Array, "B H T P"],
               beta: Float[Array, "B H T"], log_decay: Float[Array, "B H T"], tokens: Tokens, state: MemoryState,
               form: Form | None = None):
    """The recurrence over a piece.

    Args: q, k: of each head, or of G groups of heads; beta: the share that is written; log_decay: g, not above 0.
    Returns: y [B, H, T, P] in the dtype of the state, and the state after the piece.
    """
    run = sequential
    return remember(run, "BHT BHT", q, k, v, beta, log_decay, tokens=tokens, state=state)


def sequential(q, k, v, beta, g, starts, S):
    """Step by step: the definition."""
    def step(S, q, k, v, beta, g):
        S = jnp.exp(g)[..., None, None] * S
        error = v - dot("BHN,BHNP->BHP", k, S)
        S = S + (beta[..., None] * k)[..., :, None] * error[..., None, :]
        return S, dot("BHN,BHNP->BHP", q, S)

    return step_by_step(step, starts, S, per_head(q, v.shape[1]), per_head(k, v.shape[1]), v, beta, g)
