"""From token ids to the stream and from the stream to losses and logits."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.layers.alphabet import fan_in_normal, parameter, project
from archlab.layers.contract import wide
from archlab.layers.sharding import constrain

CHUNK_LOGITS = 2**24  # logits held at once by the loss: 64 MiB in float32


class Embedding(nnx.Module):
    """A table [V, D] with entries of standard deviation 1/sqrt(D), so that a tied head starts with logits of size 1."""

    def __init__(self, vocab: int, width: int, rngs: nnx.Rngs):
        self.table = parameter(rngs, "V->D", (vocab, width), fan_in_normal(width))

    def __call__(self, ids: Int[Array, "B T"], dtype=None) -> Float[Array, "B T D"]:
        return jnp.take(constrain(self.table[...], "V."), ids, axis=0).astype(dtype or self.table.dtype)


class Head(nnx.Module):
    """Logits over the vocabulary: weight [D, V]."""

    def __init__(self, vocab: int, width: int, rngs: nnx.Rngs):
        self.weight = parameter(rngs, "D->V", (width, vocab))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return project(x, self.weight, "BTD,DV->BTV")


def tied_logits(x: Float[Array, "B T D"], embedding: Embedding) -> Float[Array, "B T V"]:
    """Logits from the embedding's own table (Press & Wolf 2017, arXiv:1608.05859)."""
    return project(x, embedding.table, "BTD,VD->BTV")


def cross_entropy(head, x: Float[Array, "B T D"], targets: Int[Array, "B T"],
                  vocab: int) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, float32; never more than `CHUNK_LOGITS` logits at once.

    Args: head: a function from a piece of `x` to its logits; targets: ids, any value where the loss is not wanted.
    """
    @jax.checkpoint
    def piece(x, targets):
        logits = wide(head(x))
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    B, T = targets.shape
    chunk = max(1, min(T, CHUNK_LOGITS // (B * vocab)))
    if chunk == T:
        return piece(x, targets)
    pieces, pad = -(-T // chunk), -T % chunk
    cut = lambda a: jnp.moveaxis(
        jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2)).reshape(B, pieces, chunk, *a.shape[2:]), 1, 0)
    losses = jax.lax.map(lambda pair: piece(*pair), (cut(x), cut(targets)))
    return jnp.moveaxis(losses, 0, 1).reshape(B, pieces * chunk)[:, :T]
