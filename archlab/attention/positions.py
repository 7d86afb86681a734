"""Rotary positions (Su et al. 2021, RoFormer, arXiv:2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from archlab.layers.config import Config, require
from archlab.layers.contract import wide


class Rotary(Config):
    """Rotates pairs of channels by `position * base^(-2j/K)`; pairs are (j, j + K/2), the half-split layout.

    base: the longest wavelength over 2 pi.
    """

    base: float = 10000.0

    def __post_init__(self):
        require(self.base > 1, self, "base", "must be above 1")

    def rotate(self, x: Float[Array, "B H T K"], positions: Int[Array, "B T"]) -> Float[Array, "B H T K"]:
        """`x` turned by its positions; the dot product of two such depends on their distance alone."""
        half = x.shape[-1] // 2
        wide_dtype = wide(x).dtype
        frequency = self.base ** (-jnp.arange(half, dtype=wide_dtype) / half)
        angle = positions[:, None, :, None].astype(wide_dtype) * frequency
        cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
