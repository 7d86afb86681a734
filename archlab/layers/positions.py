"""Places that are added to the stream, before the first block: learned vectors, or sinusoids.

`Sequence(LearnedPositions(1024), *blocks)`. What attention itself does about places is in attention/positions.py.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from archlab.layers.alphabet import fan_in_normal, parameter
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, wide


class LearnedPositions(LayerConfig):
    """A learned vector for each of `length` places (Gehring et al. 2017, arXiv:1705.03122; GPT-2, BERT).

    offset: rows of the table before that of the first place (2 in OPT and BART).

    A longer text cannot be run: ValueError where the row or the state's `max_length` exceeds `length`. Places given
    by hand that exceed it cannot be seen in advance, and make the token NaN rather than take another's vector.
    """

    length: int
    offset: int = 0

    def __post_init__(self):
        require(self.length >= 1, self, "length", "must be at least 1")
        require(self.offset >= 0, self, "offset", "must be 0 or more")

    @property
    def longest(self) -> int:
        return self.length

    def build(self, rngs: nnx.Rngs, at: Place) -> "LearnedPositionsModule":
        return LearnedPositionsModule(self, rngs, at)


class LearnedPositionsModule(Layer):
    """Weight: table [offset + length, D], entries at first as large as an embedding's."""

    def __init__(self, config: LearnedPositions, rngs: nnx.Rngs, at: Place):
        self.config = config
        self.table = parameter(rngs, "->.D", (config.offset + config.length, at.width), fan_in_normal(at.width))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        self._check("max_length", max_length)
        return None

    def __call__(self, x, tokens: Tokens, state=None):
        self._check("a row", x.shape[1])
        rows = tokens.positions + self.config.offset
        return x + jnp.take(self.table[...], rows, axis=0, mode="fill").astype(x.dtype), None, Aux()

    def _check(self, what: str, tokens: int) -> None:
        if tokens > self.config.length:
            raise ValueError(f"{what} of {tokens} tokens: LearnedPositions.length = {self.config.length} is all that "
                             "the model has places for")


class SinusoidalPositions(LayerConfig):
    """Sine and cosine of `position * base^(-2j/D)` (Vaswani et al. 2017, arXiv:1706.03762, section 3.5).

    scale: their size. In the paper it is 1, as is that of embeddings, which are multiplied by sqrt(D)
    (`LanguageModel.embedding_scale`); for embeddings as they are it is D^-0.5.
    interleaved: sines in the even channels and cosines in the odd ones, as in the paper; False for all sines before
    all cosines (Marian, and Tensor2Tensor up to its choice of frequencies).
    """

    base: float = 10000.0
    scale: float = 1.0
    interleaved: bool = True

    def __post_init__(self):
        require(self.base > 1, self, "base", "must be above 1")
        require(self.scale > 0, self, "scale", "must be above 0")

    def check(self, width: int) -> None:
        if width % 2:
            raise ValueError(f"SinusoidalPositions: sines and cosines come in pairs: the width {width} must be even")

    def build(self, rngs: nnx.Rngs, at: Place) -> "SinusoidalPositionsModule":
        return SinusoidalPositionsModule(self)


class SinusoidalPositionsModule(Layer):
    def __init__(self, config: SinusoidalPositions):
        self.config = config

    def __call__(self, x, tokens: Tokens, state=None):
        config, places = self.config, tokens.positions.astype(wide(x).dtype)
        signal = config.scale * sinusoids(places, x.shape[-1], config.base, config.interleaved)
        return x + signal.astype(x.dtype), None, Aux()


def sinusoids(places: Float[Array, "..."], width: int, base: float, interleaved: bool = True) -> Float[Array, "... D"]:
    """`sin(p / base^(2j/D))` in channels 2j and `cos` of the same in channels 2j + 1, or sines before cosines; `width`
    is even."""
    frequencies = jnp.asarray(base ** (-np.arange(0, width, 2) / width), places.dtype)
    angle = places[..., None] * frequencies
    pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1 if interleaved else -2)
    return pairs.reshape(*places.shape, width)
