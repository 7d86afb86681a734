"""Matrix states that decay by one number per head and token.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        y_t = q_t S_t

Mamba-2's structured state-space duality (Dao & Gu 2024, arXiv:2405.21060, section 6), RetNet (arXiv:2307.08621),
lightning attention (arXiv:2401.04658) and, with its normaliser as one more value, the mLSTM (arXiv:2405.04517).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from archlab.layers.contract import Tokens
from archlab.recurrence.chunks import chunk_by_chunk, decays
from archlab.recurrence.forms import Chunked, Form, select
from archlab.recurrence.kernels.matrix import fitting
from archlab.recurrence.kernels.scalar_decay import scalar_decay_kernel
from archlab.recurrence.memory import MemoryState, dot, per_head, remember, step_by_step


def scalar_decay(q: Float[Array, "B G T N"], k: Float[Array, "B G T N"], v: Float[Array, "B H T P"],
                 log_decay: Float[Array, "B H T"], tokens: Tokens, state: MemoryState, form: Form | None = None):
    """The recurrence over a piece.

    Args: q, k: of each head, or of G groups of heads; log_decay: g, not above 0;
      form: any but `Associative()`.
    Returns: y [B, H, T, P] in the dtype of the state, and the state after the piece. ValueError for arguments that do
      not fit together, and for `Kernel` where there is no GPU or TPU and it is not interpreted.
    """
    def choose(S, length):
        return select(form or fitting(S, length) or Chunked(32), length, sequential, chunked, scalar_decay_kernel)

    return remember(choose, "BGTN BGTN BHTP BHT", tokens, state, q=q, k=k, v=v, log_decay=log_decay)


def sequential(q, k, v, g, starts, S):
    """Step by step: the definition."""
    def step(S, q, k, v, g):
        S = jnp.exp(g)[..., None, None] * S + k[..., :, None] * v[..., None, :]
        return S, dot("BHN,BHNP->BHP", q, S)

    return step_by_step(step, starts, S, per_head(q, v.shape[1]), per_head(k, v.shape[1]), v, g)


def chunked(q, k, v, g, starts, S, size: int):
    """`size` steps at once."""
    return chunk_by_chunk(_chunk, size, starts, S, q, k, v, g)


def _chunk(S, documents, q, k, v, g):
    """What is read is the chunk's own keys, as attention without a softmax that decays, and the state before it."""
    within, before = decays(g, documents)
    scores = within * per_head(dot("BGTN,BGSN->BGTS", q, k), v.shape[1])
    q, k = per_head(q, v.shape[1]), per_head(k, v.shape[1])
    y = dot("BHTS,BHSP->BHTP", scores, v) + dot("BHTN,BHNP->BHTP", before[..., None] * q, S)
    written = dot("BHSN,BHSP->BHNP", within[..., -1, :, None] * k, v)
    return before[..., -1, None, None] * S + written, y
