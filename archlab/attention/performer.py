"""Performer: softmax attention, estimated by positive orthogonal random features (FAVOR+).

Choromanski et al. 2020 (arXiv:2009.14794), section 2. With x' = x / K^(1/4) and rows w_1 .. w_N drawn at random,

    phi(x)_n = N^(-1/2) (exp(w_n . x' - |x'|^2 / 2 - c) + epsilon),    E[phi(q) . phi(k)] = exp(q . k / sqrt(K) - c)

so that linear attention with phi estimates softmax attention. Causal by prefix sums, with a step of constant cost.

The stabiliser c keeps exponentials in range and cancels in the quotient (but for epsilon) as long as all features that
are summed have the same one. The published code takes, for keys, the largest exponent over the whole text: that looks
ahead, and differs from one split of the text to another. Here a query takes the largest of its own exponents, which no
other token knows of; keys take a constant. Since w . x' - |x'|^2 / 2 <= |w|^2 / 2 for every x, no key's exponent
is above max_n |w_n|^2 / 2; what of that exceeds `LARGEST` is taken off, and nothing can overflow.

The features are drawn once, with the weights, and kept with them. (The published code draws them anew now and then in
training; a state made with other features would be of no use.)
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from archlab.attention.linear import LinearAttention, LinearAttentionModule
from archlab.attention.positions import Positions, Rotary
from archlab.layers.config import require
from archlab.layers.contract import Place

EPSILON = 1e-4  # of the published code: no feature is zero
LARGEST = 40.0  # exp of it, summed over a million tokens, is far from the end of float32


class Performer(LinearAttention):
    """Attention with N = `features` random features; None for K ln K of them."""

    positions: Positions | None = Rotary()
    features: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.features is None or self.features >= 1, self, "features", "must be at least 1, or None for K ln K")

    def build(self, rngs: nnx.Rngs, at: Place) -> "PerformerModule":
        return PerformerModule(self, rngs, at)


class PerformerModule(LinearAttentionModule):
    """The weights of `Attention`. directions [N, K], no weight: the rows w, shared by all heads."""

    def __init__(self, form: Performer, rngs: nnx.Rngs, at: Place):
        super().__init__(form, rngs, at)
        K = self.key.shape[-1]
        N = form.features or max(1, int(K * math.log(K)))
        self.directions = nnx.Variable(orthogonal_directions(rngs.params(), N, K))

    @property
    def feature_count(self) -> int:
        return self.directions.shape[0]

    def features(self, q, k):
        w = jax.lax.stop_gradient(self.directions[...]).astype(q.dtype)

        def exponents(x):
            x = x * x.shape[-1] ** -0.25
            return jnp.einsum("...K,NK->...N", x, w) - (x**2).sum(-1, keepdims=True) / 2

        phi = lambda exponent: (jnp.exp(exponent) + EPSILON) * len(w) ** -0.5
        q, k = exponents(q), exponents(k)
        excess = jnp.maximum((w**2).sum(-1).max() / 2 - LARGEST, 0)
        return phi(q - jax.lax.stop_gradient(q.max(-1, keepdims=True))), phi(k - excess)


def orthogonal_directions(key: jax.Array, count: int, size: int) -> Float[Array, "N K"]:
    """Rows that are each normally distributed, and orthogonal to one another within each stretch of `size` (section
    2.4): orthonormal ones from a QR decomposition, with the lengths of other normal vectors."""
    turns, lengths = jax.random.split(key)
    blocks = jax.random.normal(turns, (-(-count // size), size, size))
    q, r = jnp.linalg.qr(blocks)
    signs = jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))  # without them Q would not be uniform among rotations
    rows = (q * signs[:, None, :]).reshape(-1, size)[:count]
    return rows * jnp.linalg.norm(jax.random.normal(lengths, (count, size)), axis=-1, keepdims=True)
