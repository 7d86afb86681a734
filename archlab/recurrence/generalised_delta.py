"""Matrix states that are corrected along one direction, at another, while each key channel decays at its own rate.

    S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t S_{t-1})^T + k_t v_t^T        y_t = q_t S_t

RWKV-7's generalised delta rule (Peng et al. 2025, arXiv:2503.14456, section 4): a transition that is diagonal plus rank
one. There a = -kk, b = kk * rate, with kk of length 1.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from archlab.layers.contract import Tokens
from archlab.recurrence.chunks import chunk_by_chunk
from archlab.recurrence.forms import Chunked, Form, select
from archlab.recurrence.kernels.generalised_delta import generalised_delta_kernel
from archlab.recurrence.kernels.matrix import fitting
from archlab.recurrence.memory import MemoryState, dot, remember, step_by_step
from archlab.recurrence.triangular import unit_inverse

# How far a channel may decay within a chunk that is computed at once, as a logarithm: its factors reach exp(+-64), and
# so stay well within float32. RWKV-7, whose g is above -0.61, never gets there.
STRONGEST = 128


def generalised_delta(q: Float[Array, "B H T N"], k: Float[Array, "B H T N"], v: Float[Array, "B H T P"],
                      a: Float[Array, "B H T N"], b: Float[Array, "B H T N"], log_decay: Float[Array, "B H T N"],
                      tokens: Tokens, state: MemoryState, form: Form | None = None):
    """The recurrence over a piece.

    Args: a: where the state is read for the correction; b: where it is written; log_decay: g, not above 0, as strong as
      one likes: but chunks in which a channel's sum is below -128 are computed step by step, which takes several times
      as long; form: any but `Associative()`.
    Returns: y [B, H, T, P] in the dtype of the state, and the state after the piece. ValueError for arguments that do
      not fit together, and for `Kernel` where there is no GPU or TPU and it is not interpreted.
    """
    def choose(S, length):
        chosen = form or fitting(S, length, most=128) or Chunked(32)
        return select(chosen, length, sequential, chunked, generalised_delta_kernel)

    letters = "BHTN BHTN BHTP BHTN BHTN BHTN"
    return remember(choose, letters, tokens, state, q=q, k=k, v=v, a=a, b=b, log_decay=log_decay)


def sequential(q, k, v, a, b, g, starts, S):
    """Step by step: the definition."""
    def step(S, q, k, v, a, b, g):
        recalled = dot("BHN,BHNP->BHP", a, S)
        S = jnp.exp(g)[..., None] * S + b[..., :, None] * recalled[..., None, :] + k[..., :, None] * v[..., None, :]
        return S, dot("BHN,BHNP->BHP", q, S)

    return step_by_step(step, starts, S, q, k, v, a, b, g)


def chunked(q, k, v, a, b, g, starts, S, size: int):
    """`size` steps at once."""
    def chunk(S, documents, starts, *now):
        def steps(S, *now):
            y, S = sequential(*now, starts[:, 0], S)
            return S, y

        mild = jnp.min(now[-1].sum(2)) >= -STRONGEST
        at_once = functools.partial(_chunk, documents=documents)
        # checkpoint, or the gradient of the one would first fill with zeros all that that of the other had kept
        return jax.lax.cond(mild, jax.checkpoint(at_once), jax.checkpoint(steps), S, *now)

    g = jnp.where(starts[:, None, :, None], 0, g)  # what is forgotten need not decay
    return chunk_by_chunk(chunk, size, starts, S, starts[:, None], q, k, v, a, b, g)


def _chunk(S, q, k, v, a, b, g, documents):
    """One chunk of Q tokens. With c the sum of g up to a token, the corrections w_t = a_t S_{t-1} solve

        w_t = a_t exp(c_{t-1}) S + sum_{s < t} (a_t exp(c_{t-1} - c_s) . b_s) w_s + (a_t exp(c_{t-1} - c_s) . k_s) v_s

    for all t at once. The decay from s to t is the product of two factors, exp(c_t - m) and exp(m - c_s), with m half
    the sum of the chunk, so that neither is large. No gradient flows through m, on which nothing depends: what it
    brings to earlier tokens from later ones would cancel, but for the rounding.
    """
    Q = q.shape[2]
    c = dot("TS,BHSN->BHTN", jnp.tril(jnp.ones((Q, Q), g.dtype)), g)  # faster than cumsum
    end = c[:, :, -1:]
    m = jax.lax.stop_gradient(end / 2)
    a, q = a * jnp.exp(c - g - m), q * jnp.exp(c - m)
    b, k = (x * jnp.exp(m - c) for x in (b, k))
    column = lambda decay: jnp.swapaxes(jnp.exp(decay), 2, 3)

    earlier, not_later = jnp.tril(documents.together, -1), jnp.tril(documents.together)
    meet = lambda reads, writes, where: jnp.where(where, dot("BHTN,BHSN->BHTS", reads, writes), 0)
    product = functools.partial(dot, "BHTS,BHSP->BHTP")
    past = lambda reads: jnp.where(documents.with_before[..., None], product(reads, column(m) * S), 0)
    w = product(unit_inverse(-meet(a, b, earlier)), past(a) + product(meet(a, k, earlier), v))
    y = past(q) + product(meet(q, b, not_later), w) + product(meet(q, k, not_later), v)

    b, k = (jnp.where(documents.with_after[..., None], x, 0) for x in (b, k))
    written = dot("BHSN,BHSP->BHNP", b, w) + dot("BHSN,BHSP->BHNP", k, v)
    return jnp.where(documents.through[..., None, None], column(end) * S, 0) + column(end - m) * written, y
