"""Normalisations of the channel axis. Statistics are taken in at least float32."""

import flax.nnx as nnx
import jax
from jaxtyping import Array, Float

from archlab.layers.alphabet import parameter
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Place, wide


class RMSNorm(LayerConfig):
    """`x / rms(x) * scale` (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    eps: float = 1e-6

    def __post_init__(self):
        require(self.eps > 0, self, "eps", "must be positive")

    def build(self, rngs: nnx.Rngs, at: Place, letter: str = "D") -> "RMSNormModule":
        """`letter` names the axis that is normalised, of size `at.width`."""
        return RMSNormModule(self, rngs, at, letter)


class RMSNormModule(nnx.Module):
    def __init__(self, config: RMSNorm, rngs: nnx.Rngs, at: Place, letter: str = "D"):
        self.eps = config.eps
        self.scale = parameter(rngs, f"->{letter}", (at.width,), nnx.initializers.ones)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_normalise(x, self.eps) * self.scale[...].astype(x.dtype)


class LayerNorm(LayerConfig):
    """`(x - mean) / std * scale + bias` (Ba et al. 2016, arXiv:1607.06450)."""

    eps: float = 1e-5
    bias: bool = True

    def __post_init__(self):
        require(self.eps > 0, self, "eps", "must be positive")

    def build(self, rngs: nnx.Rngs, at: Place) -> "LayerNormModule":
        return LayerNormModule(self, rngs, at)


class LayerNormModule(nnx.Module):
    def __init__(self, config: LayerNorm, rngs: nnx.Rngs, at: Place):
        self.eps = config.eps
        self.scale = parameter(rngs, "->D", (at.width,), nnx.initializers.ones)
        self.bias = parameter(rngs, "->D", (at.width,)) if config.bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        h = wide(x)
        h = h - h.mean(-1, keepdims=True)
        y = rms_normalise(h, self.eps).astype(x.dtype) * self.scale[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def rms_normalise(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, in the dtype of `x`."""
    h = wide(x)
    return (h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + eps)).astype(x.dtype)
