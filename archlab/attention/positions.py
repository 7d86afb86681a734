"""Where a token stands, as attention learns of it: by turning queries and keys, or by a bias on their scores.

A method is the field `positions` of an attention config; None is no positions at all (NoPE: Kazemnejad et al. 2023,
arXiv:2305.19466). What is added to the stream before the blocks is in layers/positions.py, how rotary frequencies are
changed for longer texts in scaling.py.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from archlab.attention.relative import Bias, LinearBias
from archlab.attention.scaling import Scaling, plain_frequencies
from archlab.layers.config import Config, require
from archlab.layers.contract import Tokens, wide

Heads = Float[Array, "B H T K"]


class Positions(Config):
    """Base of all methods. By default queries and keys are left alone and scores get no bias."""

    def turn(self, q: Heads, k: Float[Array, "B G T K"], tokens: Tokens) -> tuple[Heads, Float[Array, "B G T K"]]:
        """Queries and keys that know the places of their tokens."""
        return q, k

    def bias(self, heads: int, tokens: Tokens) -> Bias | None:
        """What is added to the scores of each of `heads` heads, as a function of distance."""
        return None

    def check(self, head_size: int) -> None:
        """Raises ValueError where heads of `head_size` channels do not fit."""


class Rotary(Positions):
    """Turns pair j of channels by `position * base^(-2j/size)`: the dot product of two vectors so turned depends on
    their distance alone (Su et al. 2021, RoFormer, arXiv:2104.09864).

    base: the longest wavelength over 2 pi. size: how many leading channels are turned (partial rotary: GPT-J,
    GPT-NeoX); None for all. interleaved: pairs are (2j, 2j + 1), as in the paper, GPT-J, Cohere and Llama's own code,
    and not (j, j + size/2). scaling: frequencies for longer texts.

    Angles, cosines and sines are computed in at least float32.
    """

    base: float = 10000.0
    size: int | None = None
    interleaved: bool = False
    scaling: Scaling | None = None

    def __post_init__(self):
        require(self.base > 1, self, "base", "must be above 1")
        require(self.size is None or self.size >= 2 and self.size % 2 == 0, self, "size",
                "channels are turned in pairs: must be even, at least 2, or None for all")

    def check(self, head_size: int) -> None:
        if self.size is None:
            require(head_size % 2 == 0, self, "size", f"channels are turned in pairs: a head size of {head_size} is "
                    "odd; it must be even, or size give an even part of it")
        else:
            require(self.size <= head_size, self, "size", f"must be at most the head size {head_size}")
        if self.scaling is not None:
            self.scaling.check(self.size or head_size)

    def turn(self, q, k, tokens):
        size = self.size or q.shape[-1]
        if self.scaling is None:
            frequencies, factor = plain_frequencies(self.base, size), 1.0
        else:
            frequencies, factor = self.scaling.frequencies(self.base, size, context_length(tokens))
        cos, sin = waves(tokens.positions, frequencies, wide(q).dtype)
        cos, sin = computed_once(cos * factor, sin * factor)
        return rotate(q, cos, sin, self.interleaved), rotate(k, cos, sin, self.interleaved)


class XPos(Positions):
    """Rotary positions with a decay: a score's pair j is multiplied by `zeta_j^(distance / scale_base)`, where
    `zeta_j = (2j/K + gamma) / (1 + gamma)` (Sun et al. 2022, arXiv:2212.10554, algorithm 1). Pairs are (j, j + K/2).

    The decay is split: queries take `zeta^(m / scale_base)`, keys `zeta^(-n / scale_base)`, for places m and n. Where
    the two would leave the dtype's range they stay at its edge, so that a pair of channels no longer decays between
    tokens that both stand so far; with the published numbers from place 18,000 on (in float16 from 2,200).
    """

    base: float = 10000.0
    scale_base: float = 512.0
    gamma: float = 0.4

    def __post_init__(self):
        require(self.base > 1, self, "base", "must be above 1")
        require(self.scale_base > 0, self, "scale_base", "must be above 0")
        require(self.gamma > 0, self, "gamma", "must be above 0")

    def check(self, head_size: int) -> None:
        if head_size % 2:
            raise ValueError(f"XPos: channels are turned in pairs: the head size {head_size} must be even")

    def turn(self, q, k, tokens):
        size, dtype = q.shape[-1], wide(q).dtype
        cos, sin = waves(tokens.positions, plain_frequencies(self.base, size), dtype)
        zeta = (jnp.arange(0, size, 2, dtype=dtype) / size + self.gamma) / (1 + self.gamma)
        exponent = jnp.log(zeta) * (tokens.positions[:, None, :, None].astype(dtype) / self.scale_base)
        edge = math.log(float(jnp.finfo(q.dtype).max)) / 2  # of both: their product, for a key to come, is finite too
        decay = jnp.exp(jnp.clip(exponent, -edge, edge))
        waves_of_both = computed_once(cos * decay, sin * decay, cos / decay, sin / decay)
        return rotate(q, *waves_of_both[:2]), rotate(k, *waves_of_both[2:])


class ALiBi(Positions):
    """Scores less `m_h |distance|`, with a slope for each head (Press et al. 2021, arXiv:2108.12409, section 3).

    The slopes of H = 2^n heads are the powers 1 .. H of `2^(-max_bias / H)`. For other H they are those of the next
    lower power of two, and then every second one of the next higher. scale: multiplies them (Falcon: K^-0.5).
    """

    scale: float = 1.0
    max_bias: float = 8.0

    def __post_init__(self):
        require(self.scale > 0, self, "scale", "must be above 0")
        require(self.max_bias > 0, self, "max_bias", "must be above 0")

    def slopes(self, heads: int) -> tuple[float, ...]:
        """m_h for each head, all above 0."""
        whole = 2 ** int(math.log2(heads))
        exponents = [h / whole for h in range(1, whole + 1)]
        exponents += [(h - 0.5) / whole for h in range(1, heads - whole + 1)]
        return tuple(self.scale * 2 ** (-self.max_bias * exponent) for exponent in exponents)

    def bias(self, heads, tokens):
        return LinearBias(self.slopes(heads))


class RelativePositions(Positions):
    """T5's learned bias by distance: reads the table of the `RelativeBias` layer that stands before the blocks."""

    def bias(self, heads, tokens):
        bias = tokens.provided.get("relative_bias")
        if bias is None:
            raise ValueError("RelativePositions: no table was published; put a RelativeBias layer before the blocks, "
                             "in the Sequence that holds them")
        if bias.heads != heads:
            raise ValueError(f"RelativePositions: the RelativeBias layer has {bias.heads} heads, the attention {heads}")
        return bias


class Temperature(Positions):
    """No places, but queries grow with theirs, against attention that spreads over ever more keys: times
    `1 + scale * ln(1 + floor((position + 1) / floor))` (the NoPE layers of Llama 4, as in its released code)."""

    scale: float = 0.1
    floor: int = 8192

    def __post_init__(self):
        require(self.scale >= 0, self, "scale", "must be 0 or more")
        require(self.floor >= 1, self, "floor", "must be at least 1")

    def turn(self, q, k, tokens):
        steps = ((tokens.positions + 1) // self.floor)[:, None, :, None]
        return (q * (1 + self.scale * jnp.log1p(steps.astype(wide(q).dtype)))).astype(q.dtype), k


def context_length(tokens: Tokens):
    """The declared length of the context: an int32 scalar, or the length of the row where none is declared."""
    return tokens.positions.shape[1] if tokens.context_length is None else tokens.context_length


def waves(positions: Int[Array, "B T"], frequencies, dtype) -> tuple[Float[Array, "B 1 T F"], Float[Array, "B 1 T F"]]:
    """Cosine and sine of `position * frequency`."""
    angle = positions[:, None, :, None].astype(dtype) * jnp.asarray(frequencies, dtype)
    return jnp.cos(angle), jnp.sin(angle)


def computed_once(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays of one shape, held in memory. XLA's CPU compiler would rather compute a cosine again for each head and
    channel that it meets, but takes the result of a product as it is: turning is five times as fast."""
    if jax.default_backend() != "cpu":
        return arrays
    stacked = jnp.stack(arrays)
    one = jnp.eye(len(arrays), dtype=stacked.dtype)
    return tuple(jnp.einsum("PQ,Q...->P...", one, stacked, precision="highest"))


def rotate(x: Heads, cos: Float[Array, "B 1 T F"], sin: Float[Array, "B 1 T F"], interleaved: bool = False) -> Heads:
    """`x` with the first 2F channels of each head turned, pair by pair, and the rest as they are."""
    cos, sin, size = cos.astype(x.dtype), sin.astype(x.dtype), 2 * cos.shape[-1]
    pairs, rest = x[..., :size], x[..., size:]
    if interleaved:
        a, b = pairs[..., 0::2], pairs[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(pairs.shape)
    else:
        a, b = jnp.split(pairs, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, rest], axis=-1)
