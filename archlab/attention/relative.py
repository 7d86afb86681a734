"""Biases that attention adds to its scores by the distance of query and key, and the layer that learns T5's."""

import functools
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.layers.alphabet import fan_in_normal, parameter
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens


class Bias(Protocol):
    """A pytree that the attention core calls for each block, and differentiates in its arrays."""

    def __call__(self, distance: Int[Array, "B T S"]) -> Float[Array, "B H T S"]:
        """Args: distance: the query's place less the key's; negative for later keys."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["slopes"])
@dataclass(frozen=True)
class LinearBias:
    """`-slope |distance|`, a fixed slope for each head."""

    slopes: tuple[float, ...]

    def __call__(self, distance: Int[Array, "B T S"]) -> Float[Array, "B H T S"]:
        slopes = jnp.asarray(self.slopes)
        return -slopes[:, None, None] * abs(distance)[:, None].astype(slopes.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["max_distance", "causal"])
@dataclass(frozen=True)
class TableBias:
    """A learned number for each head and bucket of distances; table [buckets, H]."""

    table: Float[Array, "buckets H"]
    max_distance: int
    causal: bool

    @property
    def heads(self) -> int:
        return self.table.shape[1]

    def __call__(self, distance: Int[Array, "B T S"]) -> Float[Array, "B H T S"]:
        """One look-up a score, of a number for each distance that is told from others; and so backwards. On a CPU
        that is ten times as fast as a product with one-hot buckets."""
        farthest = self.max_distance
        nearest = 0 if self.causal else -farthest  # beyond these, all distances share the last bucket
        buckets = bucket_of(np.arange(nearest, farthest + 1), self.table.shape[0], farthest, self.causal)
        by_distance = self.table.T[:, buckets]
        index = jnp.clip(distance, nearest, farthest) - nearest
        return jnp.swapaxes(jnp.take(by_distance, index, axis=1, mode="clip"), 0, 1)


def bucket_of(distance: np.ndarray, buckets: int, max_distance: int, causal: bool) -> np.ndarray:
    """T5's bucket of each distance (Raffel et al. 2019, arXiv:1910.10683, section 2.1, as in its code).

    Half of the buckets hold one distance each, the other half ever wider ranges, up to `max_distance` and all beyond.
    If not `causal`, the first half of all buckets are for keys before the query and the second for keys after it;
    otherwise later keys go with the query itself.
    """
    if not causal:
        side = buckets // 2
        return side * (distance < 0) + bucket_of(abs(distance), side, max_distance, True)
    distance, exact = np.maximum(distance, 0), buckets // 2
    octaves = np.log(np.maximum(distance, exact) / exact) / np.log(max_distance / exact)
    far = exact + np.floor(octaves * (buckets - exact) + 1e-9).astype(int)  # a range's first distance is in it
    return np.where(distance < exact, distance, np.minimum(far, buckets - 1))


class RelativeBias(LayerConfig):
    """T5's table of biases, learned once and used by every attention with `RelativePositions()` that follows:
    `Sequence(RelativeBias(heads), *blocks)`. The stream passes unchanged.

    heads: H, of the attention. buckets: of distances. max_distance: from which on all distances are one. causal: keys
    after the query have no buckets, which leaves the others twice as many.
    """

    heads: int
    buckets: int = 32
    max_distance: int = 128
    causal: bool = True

    def __post_init__(self):
        require(self.heads >= 1, self, "heads", "must be at least 1")
        sides = 1 if self.causal else 2
        require(self.buckets >= 2 * sides and self.buckets % sides == 0, self, "buckets",
                "must be at least 2" if self.causal else "must be even and at least 4: half are for later keys")
        require(self.max_distance > self.buckets // sides // 2, self, "max_distance",
                f"must be above {self.buckets // sides // 2}, the number of buckets of one distance each")

    def build(self, rngs: nnx.Rngs, at: Place) -> "RelativeBiasModule":
        return RelativeBiasModule(self, rngs, at)


class RelativeBiasModule(Layer):
    """Weight: table [buckets, H]."""

    def __init__(self, config: RelativeBias, rngs: nnx.Rngs, at: Place):
        self.config = config
        self.table = parameter(rngs, "->.H", (config.buckets, config.heads), fan_in_normal(at.width))

    def __call__(self, x, tokens: Tokens, state=None):
        bias = TableBias(self.table[...], self.config.max_distance, self.config.causal)
        return x, None, Aux(provides={"relative_bias": bias})
