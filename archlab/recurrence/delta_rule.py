"""Matrix states that are corrected: what the key recalls is replaced by a mix of it and the new value.

    S'_t = exp(g_t) S_{t-1}        S_t = S'_t + beta_t k_t (v_t - k_t S'_t)^T        y_t = q_t S_t

DeltaNet (Schlag et al. 2021, arXiv:2102.11174; in parallel: Yang et al. 2024, arXiv:2406.06484) without decay, Gated
DeltaNet (arXiv:2412.06464) with one number per head and token. Keys of length 1 and beta up to 1 never overshoot; beta
up to 2 lets the transition's eigenvalue along the key be negative (arXiv:2411.12537).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from archlab.layers.contract import Tokens
from archlab.recurrence.chunks import chunk_by_chunk
from archlab.recurrence.forms import Chunked, Form, select
from archlab.recurrence.kernels.delta_rule import delta_rule_kernel
from archlab.recurrence.kernels.matrix import fitting
from archlab.recurrence.memory import MemoryState, dot, per_head, remember, step_by_step
from archlab.recurrence.triangular import unit_inverse


def delta_rule(q: Float[Array, "B G T N"], k: Float[Array, "B G T N"], v: Float[Array, "B H T P"],
               beta: Float[Array, "B H T"], log_decay: Float[Array, "B H T"], tokens: Tokens, state: MemoryState,
               form: Form | None = None):
    """The recurrence over a piece.

    Args: q, k: of each head, or of G groups of heads; beta: the share that is written; log_decay: g, not above 0;
      form: any but `Associative()`.
    Returns: y [B, H, T, P] in the dtype of the state, and the state after the piece. ValueError for arguments that do
      not fit together, and for `Kernel` where there is no GPU or TPU and it is not interpreted.
    """
    def choose(S, length):
        return select(form or fitting(S, length) or Chunked(32), length, sequential, chunked, delta_rule_kernel)

    return remember(choose, "BGTN BGTN BHTP BHT BHT", tokens, state, q=q, k=k, v=v, beta=beta, log_decay=log_decay)


def sequential(q, k, v, beta, g, starts, S):
    """Step by step: the definition."""
    def step(S, q, k, v, beta, g):
        S = jnp.exp(g)[..., None, None] * S
        error = v - dot("BHN,BHNP->BHP", k, S)
        S = S + (beta[..., None] * k)[..., :, None] * error[..., None, :]
        return S, dot("BHN,BHNP->BHP", q, S)

    return step_by_step(step, starts, S, per_head(q, v.shape[1]), per_head(k, v.shape[1]), v, beta, g)


def chunked(q, k, v, beta, g, starts, S, size: int):
    """`size` steps at once."""
    return chunk_by_chunk(_chunk, size, starts, S, q, k, v, beta, g)


def _chunk(S, documents, q, k, v, beta, g):
    """One chunk of Q tokens. With c the sum of g up to a token, from where its document begins, the corrections
    u_t = beta_t (v_t - k_t S'_t) solve

        u_t + beta_t sum_{s < t} exp(c_t - c_s) (k_t . k_s) u_s = beta_t (v_t - exp(c_t) k_t S)

    for all t at once, and from there on this is linear attention that decays, with the values u.
    """
    v, beta, g, matrix = (a.reshape(*k.shape[:2], -1, *a.shape[2:]) for a in (v, beta, g, S))  # R heads a group
    together, with_before = documents.together[:, None], documents.with_before[:, None]
    seen = jnp.tril(together)
    g = jnp.maximum(g, -40)  # exp(-40) is nothing to any sum, and infinities have no difference
    c = dot("BGRS,BTS->BGRT", g, seen[:, 0, 0].astype(g.dtype))  # within the document; faster than cumsum
    decay = jnp.exp(jnp.where(seen, c[..., :, None] - c[..., None, :], -jnp.inf))
    before = jnp.exp(jnp.where(with_before, c, -jnp.inf))[..., None]
    beta = beta[..., None]

    keys, queries = (dot("BGTN,BGSN->BGTS", a, k)[:, :, None] for a in (k, q))
    recalled, answered = (before * dot("BGTN,BGRNP->BGRTP", a, matrix) for a in (k, q))
    u = dot("BGRTS,BGRSP->BGRTP", unit_inverse(beta * keys * decay), beta * (v - recalled))
    y = answered + dot("BGRTS,BGRSP->BGRTP", queries * decay, u)
    written = dot("BGTN,BGRTP->BGRNP", k, decay[..., -1, :, None] * u)
    return (before[..., -1:, :] * matrix + written).reshape(S.shape), y.reshape(S.shape[0], -1, *y.shape[3:])
