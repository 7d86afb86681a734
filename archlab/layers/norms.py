"""Normalisations of the channel axis. Statistics are taken in at least float32."""

import flax.nnx as nnx
import jax
from jaxtyping import Array, Float

from archlab.layers.alphabet import parameter
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, wide


class Norm(LayerConfig):
    """Base of all norms. `normalise` is the statistic; the module multiplies gains and adds biases where there are any.

    eps: what keeps the division finite. centred: the gain is 1 + scale, so that weights lie around zero (Gemma).
    gain, bias: whether there are such parameters.
    """

    eps: float = 1e-6
    centred: bool = False
    gain: bool = True
    bias: bool = False

    def __post_init__(self):
        require(self.eps > 0, self, "eps", "must be positive")
        require(self.gain or not self.centred, self, "centred", "is about the gain, and there is none")

    def normalise(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """`x` over its size along the last axis, without gain and bias, in the dtype of `x`."""
        raise TypeError(f"{type(self).__name__} does not say how it normalises")

    def build(self, rngs: nnx.Rngs, at: Place, letter: str = "D") -> "NormModule":
        """`letter` names the axis that is normalised, of size `at.width`."""
        return NormModule(self, rngs, (at.width,), f"->{letter}")


class RMSNorm(Norm):
    """`x / rms(x) * scale` (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def normalise(self, x):
        return rms_normalise(x, self.eps)


class LayerNorm(Norm):
    """`(x - mean) / std * scale + bias` (Ba et al. 2016, arXiv:1607.06450). Without either it is OLMo's
    (arXiv:2402.00838)."""

    eps: float = 1e-5
    bias: bool = True

    def normalise(self, x):
        h = wide(x)
        return rms_normalise(h - h.mean(-1, keepdims=True), self.eps).astype(x.dtype)


class L2Norm(Norm):
    """`x / |x| * scale` (Henry et al. 2020, for queries and keys, arXiv:2010.04245)."""

    def normalise(self, x):
        h = wide(x)
        return (h * jax.lax.rsqrt((h * h).sum(-1, keepdims=True) + self.eps)).astype(x.dtype)


class NormModule(nnx.Module):
    """Weights: scale and bias, each where the norm has one; their shape [D], or what ends in the normalised axis."""

    def __init__(self, norm: Norm, rngs: nnx.Rngs, shape: tuple[int, ...], letters: str):
        self.norm = norm
        ones = nnx.initializers.zeros if norm.centred else nnx.initializers.ones
        self.scale = parameter(rngs, letters, shape, ones) if norm.gain else None
        self.bias = parameter(rngs, letters, shape) if norm.bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.affine(self.norm.normalise(x))

    def affine(self, y: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Gain and bias of what has been normalised."""
        if self.scale is not None:
            y = y * (self.scale[...] + self.norm.centred).astype(y.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Normalise(LayerConfig):
    """A norm as a layer of its own: of the embedded text before the first block (BLOOM, BART, BERT)."""

    norm: Norm = LayerNorm()

    def build(self, rngs: nnx.Rngs, at: Place) -> "NormaliseModule":
        return NormaliseModule(self, rngs, at)


class NormaliseModule(Layer):
    def __init__(self, config: Normalise, rngs: nnx.Rngs, at: Place):
        self.norm = config.norm.build(rngs, at)

    def __call__(self, x, tokens: Tokens, state=None):
        return self.norm(x), None, Aux()


def rms_normalise(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, in the dtype of `x`."""
    h = wide(x)
    return (h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + eps)).astype(x.dtype)
