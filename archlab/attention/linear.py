"""Linear attention: a product of features in place of the softmax's exponential, so that the past is one matrix.

    y_t = phi(q_t) S_t / (phi(q_t) . z_t)        S_t = sum_{s <= t} phi(k_s) v_s^T        z_t = sum_{s <= t} phi(k_s)

Katharopoulos et al. 2020 (arXiv:2006.16236), sections 3.2 to 3.4, with phi(x) = elu(x) + 1. Time is taken in chunks:
within one, plain products of matrices under a causal mask; from one to the next, S and z. A step costs the same
whatever came before.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.attention.heads import HeadsConfig, HeadsModule
from archlab.attention.positions import Positions
from archlab.layers.alphabet import project
from archlab.layers.config import require
from archlab.layers.contract import Aux, Place, Tokens, document_starts, pytree, wide
from archlab.layers.sharding import per_shard

# HIGHEST, because the dots of GPUs and TPUs would round what is summed over all the past.
dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class LinearAttention(HeadsConfig):
    """Attention with features elu(x) + 1. chunk: how many tokens are taken at once; changes nothing but the speed.

    By default without positions, as in the paper, which adds them to the stream.
    """

    positions: Positions | None = None
    chunk: int = 128

    def __post_init__(self):
        super().__post_init__()
        require(self.chunk >= 1, self, "chunk", "must be at least 1")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "LinearAttentionModule":
        return LinearAttentionModule(self, rngs, at)


@pytree
class LinearState:
    """sums [B, G, N, K] and norms [B, G, N]: S and z of each row's last document, at least float32; N features.
    segment [B]: that document."""

    sums: Float[Array, "B G N K"]
    norms: Float[Array, "B G N"]
    segment: Int[Array, "B"]


class LinearAttentionModule(HeadsModule):
    """The weights of `Attention`. A subclass with other features overrides `features` and `feature_count`."""

    def features(self, q: Float[Array, "B G R T K"], k: Float[Array, "B G T K"]) -> tuple:
        """phi(q) [B, G, R, T, N] and phi(k) [B, G, T, N], not negative. phi(k) may not depend on other tokens, nor on
        how many there are: what is in the state stays there."""
        phi = lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))
        return phi(q), phi(k)

    @property
    def feature_count(self) -> int:
        return self.key.shape[-1]

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        (_, G, K), N = self.key.shape, self.feature_count
        zeros = lambda *shape: jnp.zeros((batch, *shape), jnp.promote_types(dtype, jnp.float32))
        return LinearState(zeros(G, N, K), zeros(G, N), jnp.zeros((batch,), jnp.int32))

    def __call__(self, x, tokens: Tokens, state: LinearState | None = None):
        q, k, v = self.heads(x, tokens)
        B, H, T, K = q.shape
        phi_q, phi_k = self.features(wide(q).reshape(B, k.shape[1], -1, T, K), wide(k))
        phi_k = jnp.where(tokens.real[:, None, :, None], phi_k, 0)  # what adds nothing leaves the state as it is

        past = self.init_state(B, 0, phi_q.dtype) if state is None else state
        starts, last = document_starts(tokens.segments, past.segment)
        run = functools.partial(linear_attention, chunk=self.form.chunk)
        run = per_shard(run, "BG.TN BGTN BGTK BT BGNK BGN", "BG.TK BGNK BGN")
        y, sums, norms = run(phi_q, phi_k, wide(v), jnp.cumsum(starts, 1), past.sums, past.norms)
        y = y.reshape(q.shape).astype(x.dtype)
        state = None if state is None else LinearState(sums, norms, last)
        return project(y, self.out, "BHTK,HKD->BTD"), state, Aux()


def linear_attention(q: Float[Array, "B G R T N"], k: Float[Array, "B G T N"], v: Float[Array, "B G T K"],
                     documents: Int[Array, "B T"], sums: Float[Array, "B G N K"], norms: Float[Array, "B G N"],
                     chunk: int = 128):
    """Causal linear attention of features over a piece.

    Args: q, k: features, k zero at padding; documents: never falling along a row, 0 for the document of `sums` and
      `norms`, which are S and z before the piece. Returns: y [B, G, R, T, K], and S and z after the piece, all in the
      dtype of `sums`.

    Memory of the backward pass: S and z once a chunk.
    """
    T = q.shape[3]
    size = min(chunk, T)
    chunks, pad = -(-T // size), -T % size

    def cut(a, axis, mode="constant"):
        a = jnp.pad(a, [(0, pad if i == axis else 0) for i in range(a.ndim)], mode=mode)
        return jnp.moveaxis(a.reshape(*a.shape[:axis], chunks, size, *a.shape[axis + 1:]), axis, 0)

    q, k, v = (a.astype(sums.dtype) for a in (q, k, v))
    steps = cut(q, 3), cut(k, 2), cut(v, 2), cut(documents, 1, "edge")  # behind the end: no keys of the last document
    carry = sums, norms, jnp.zeros_like(documents[:, 0])
    if chunks == 1:
        (sums, norms, _), y = _chunk(carry, [a[0] for a in steps])
        return y, sums, norms
    (sums, norms, _), y = jax.lax.scan(jax.checkpoint(_chunk), carry, steps)
    return jnp.moveaxis(y, 0, 3).reshape(*q.shape[:3], chunks * size, -1)[:, :, :, :T], sums, norms


def _chunk(carry, now):
    """One chunk. carry: S, z, and the document they are of."""
    sums, norms, document = carry
    q, k, v, documents = now
    seen = jnp.tril(documents[:, :, None] == documents[:, None, :])
    scores = jnp.where(seen[:, None, None], dot("BGRTN,BGSN->BGRTS", q, k), 0)
    before = (documents == document[:, None])[:, None, None, :]
    above = dot("BGRTS,BGSK->BGRTK", scores, v) + jnp.where(before[..., None], dot("BGRTN,BGNK->BGRTK", q, sums), 0)
    below = scores.sum(-1) + jnp.where(before, dot("BGRTN,BGN->BGRT", q, norms), 0)
    y = above / jnp.where(below > 0, below, 1)[..., None]  # 0 at padding, where nothing is seen

    last = documents[:, -1]
    k = jnp.where((documents == last[:, None])[:, None, :, None], k, 0)
    goes_on = (last == document)[:, None, None]
    sums = jnp.where(goes_on[..., None], sums, 0) + dot("BGTN,BGTK->BGNK", k, v)
    norms = jnp.where(goes_on, norms, 0) + k.sum(2)
    return (sums, norms, last), y
