"""Matrix states whose every key channel decays at a rate of its own.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        y_t = q_t S_t
    with a bonus u:                                 y_t = q_t (S_{t-1} + diag(u) k_t v_t^T)

Gated linear attention (Yang et al. 2023, arXiv:2312.06635, section 4), HGRN2 (arXiv:2404.07904), and with the bonus
RWKV-5 and RWKV-6 (arXiv:2404.05892), which read before they forget and write.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from archlab.layers.contract import Tokens
from archlab.recurrence.chunks import LEAST, chunk_by_chunk
from archlab.recurrence.forms import Chunked, Form, select
from archlab.recurrence.kernels.channel_decay import channel_decay_kernel
from archlab.recurrence.kernels.matrix import fitting
from archlab.recurrence.memory import MemoryState, dot, remember, step_by_step
from archlab.recurrence.shapes import check_shapes


def channel_decay(q: Float[Array, "B H T N"], k: Float[Array, "B H T N"], v: Float[Array, "B H T P"],
                  log_decay: Float[Array, "B H T N"], tokens: Tokens, state: MemoryState,
                  bonus: Float[Array, "H N"] | None = None, form: Form | None = None):
    """The recurrence over a piece.

    Args: log_decay: g, not above 0; as strong as one likes; bonus: u; form: any but `Associative()`.
    Returns: y [B, H, T, P] in the dtype of the state, and the state after the piece. ValueError for arguments that do
      not fit together, and for `Kernel` where there is no GPU or TPU and it is not interpreted.
    """
    def choose(S, length):
        run = select(form or fitting(S, length) or Chunked(16), length, sequential, chunked, channel_decay_kernel)
        return run if bonus is None else functools.partial(run, read_first=True)

    y, state = remember(choose, "BHTN BHTN BHTP BHTN", tokens, state, q=q, k=k, v=v, log_decay=log_decay)
    if bonus is None:
        return y, state
    # Reading before the write is reading the state of the token before: what the token itself adds is known.
    check_shapes("BHTN HN", q=q, bonus=bonus)
    own = (q * k).astype(y.dtype) * bonus[:, None, :].astype(y.dtype)
    return y + own.sum(-1, keepdims=True) * v.astype(y.dtype), state


def sequential(q, k, v, g, starts, S, read_first: bool = False):
    """Step by step: the definition. read_first: y is of S_{t-1}, not of S_t."""
    def step(S, q, k, v, g):
        new = jnp.exp(g)[..., None] * S + k[..., :, None] * v[..., None, :]
        return new, dot("BHN,BHNP->BHP", q, S if read_first else new)

    return step_by_step(step, starts, S, q, k, v, g)


def chunked(q, k, v, g, starts, S, size: int, read_first: bool = False):
    """`size` steps at once."""
    return chunk_by_chunk(functools.partial(_chunk, read_first=read_first), size, starts, S, q, k, v, g)


def _chunk(S, documents, q, k, v, g, read_first: bool):
    """Products of matrices need the decay from s to t as a factor of s times a factor of t. So each pair of tokens
    meets at a place between them (`meetings`), and the factors are the decays from s to that place and from there to
    t: neither is above 1, however strong the decay.
    """
    sums, late, meet = meetings(q.shape[2], read_first)
    decays = jnp.exp(dot("XTR,BHRN->BHXTN", sums.astype(g.dtype), jnp.maximum(g, LEAST)))
    to_meeting, from_start, to_end = decays[:, :, :-2], decays[:, :, -2], decays[:, :, -1]
    factors = jnp.where(late, q[:, :, None], k[:, :, None]) * to_meeting
    scores = jnp.where(meet, dot("BHXTN,BHXSN->BHXTS", factors, factors), 0).sum(2)
    if not read_first:
        scores = scores + jnp.eye(q.shape[2], dtype=g.dtype) * (q * k).sum(-1, keepdims=True)
    scores = jnp.where(documents.together, scores, 0)
    q = jnp.where(documents.with_before[..., None], q * from_start, 0)
    k = jnp.where(documents.with_after[..., None], k * to_end, 0)
    y = dot("BHTS,BHSP->BHTP", scores, v) + dot("BHTN,BHNP->BHTP", q, S)
    kept = jnp.where(documents.through[..., None], jnp.exp(g.sum(2)), 0)
    return kept[..., None] * S + dot("BHSN,BHSP->BHNP", k, v), y


class Meetings(NamedTuple):
    """Where the tokens of a chunk of Q meet; bool, for X sizes of blocks. See `meetings`.

    sums [X + 2, Q, Q] at [x, t, r]: whether the decay g_r lies between token t and its meeting place in blocks of size
      2^x; the last two are between the beginning of the chunk and t, and between t and its end.
    late [X, Q, 1]: whether a token is in the second block of a pair, and brings its query; in the first, its key.
    meet [X, Q, Q] at [x, t, s]: whether t and s meet there.
    """

    sums: np.ndarray
    late: np.ndarray
    meet: np.ndarray


def meetings(Q: int, read_first: bool) -> Meetings:
    """Where tokens s < t of a chunk meet: cut into blocks of 1, 2, 4, ... tokens, they are in neighbours of one pair at
    exactly one size of block, s in the early one and t in the late one, and meet between the two. Of four tokens:

        size 1      0 | 1     2 | 3     1 meets 0, 3 meets 2
        size 2      0   1  |  2   3     2 and 3 meet 0 and 1

    What lies between 0 and 3 are the decays g_1, g_2 and g_3. They meet at size 2: k_0 brings g_1, up to the end of its
    block, and q_3 brings g_2 + g_3, from the beginning of its own. So `sums` of size 2 are, with a row for each token
    t and an x for each g_r that it brings,

                  g_0  g_1  g_2  g_3
        k_0        .    x    .    .
        k_1        .    .    .    .     it is at the meeting place
        q_2        .    .    x    .
        q_3        .    .    x    x     if `read_first`, S_2 is read, before g_3: then q_3 and q_2 lack their last x
    """
    t, r = np.ogrid[:Q, :Q]
    until, after = r < t if read_first else r <= t, r > t
    sizes = [2**x for x in range((Q - 1).bit_length())]
    late = [t // size % 2 == 1 for size in sizes]
    sums = [(t // size == r // size) & np.where(odd, until, after) for size, odd in zip(sizes, late)]
    meet = [odd & (t // size - 1 == r // size) for size, odd in zip(sizes, late)]
    stack = lambda rows, columns: np.array(rows, bool).reshape(len(rows), Q, columns)
    return Meetings(stack([*sums, until, after], Q), stack(late, 1), stack(meet, Q))
