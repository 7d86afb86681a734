"""Rotary frequencies for texts longer than those of training.

A pair j of the d turned channels has the frequency `f_j = base^(-2j/d)`. Each rule here gives other frequencies, and a
factor by which cosine and sine are multiplied. Frequencies are computed in float64, and traced only where they depend
on the context length.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from archlab.layers.config import Config, require

Frequencies = np.ndarray | Float[Array, "size/2"]


def plain_frequencies(base: float, size: int) -> np.ndarray:
    """`base^(-2j/size)` for j = 0 .. size/2 - 1 (Su et al. 2021, RoFormer, arXiv:2104.09864, section 3.2.2)."""
    return float(base) ** (-np.arange(0, size, 2) / size)


class Scaling(Config):
    """Base of all rules."""

    def frequencies(self, base: float, size: int, context_length) -> tuple[Frequencies, float]:
        """Frequencies [size/2] and the factor on cosine and sine.

        Args: size: how many channels are turned. context_length: tokens of the text, an int or a traced int32 scalar.
        """
        raise TypeError(f"{type(self).__name__} does not say its frequencies")

    def check(self, size: int) -> None:
        """Raises ValueError where `size` turned channels do not fit."""


class LinearScaling(Scaling):
    """Positional interpolation (Chen et al. 2023, arXiv:2306.15595): places are `factor` times as close, `f_j / s`."""

    factor: float

    def __post_init__(self):
        _check_factor(self)

    def frequencies(self, base, size, context_length):
        return plain_frequencies(base, size) / self.factor, 1.0


class NTKScaling(Scaling):
    """NTK-aware interpolation (bloc97 2023; in Peng et al. 2023, arXiv:2309.00071, section 3.1): the base becomes
    `base s^(d/(d-2))`, which leaves the highest frequency and divides the lowest by `factor`, s."""

    factor: float

    def __post_init__(self):
        _check_factor(self)

    def frequencies(self, base, size, context_length):
        return plain_frequencies(base, size) * _stretch(self.factor, size), 1.0


class DynamicNTK(Scaling):
    """NTK-aware interpolation by as much as the context is longer than `original` tokens (arXiv:2309.00071, section
    3.3, with emozilla's rule): s = factor L / original - (factor - 1), and 1 up to `original`.

    Frequencies depend on the context length: keys of one length do not fit another.
    """

    factor: float
    original: int

    def __post_init__(self):
        _check_factor(self)
        _check_original(self)

    def frequencies(self, base, size, context_length):
        length = jnp.maximum(context_length, self.original).astype(float)
        stretch = self.factor * (length / self.original - 1) + 1
        return plain_frequencies(base, size) * _stretch(stretch, size), 1.0


class YaRN(Scaling):
    """Interpolates pairs that turn less than `beta_slow` times in `original` tokens, leaves those that turn more than
    `beta_fast` times, and ramps between (Peng et al. 2023, arXiv:2309.00071, section 3.2, as coded by its authors).

    factor: s. original: the context of pre-training. mscale, mscale_all_dim: with both (DeepSeek), cosine and sine are
    multiplied by `m(mscale) / m(mscale_all_dim)`, else by `m(1)`, where `m(a) = 0.1 a ln s + 1`; attention_factor is
    put in place of that, and DeepSeek's own attention multiplies its scores by `score_factor` besides. truncate: the
    ramp begins and ends at whole pairs (False: gpt-oss).
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _check_factor(self)
        _check_original(self)
        require(self.beta_slow > 0, self, "beta_slow", "must be above 0")
        require(self.beta_fast >= self.beta_slow, self, "beta_fast", f"must be at least beta_slow = {self.beta_slow}")

    def frequencies(self, base, size, context_length):
        pair = lambda turns: size * math.log(self.original / (2 * math.pi * turns)) / (2 * math.log(base))
        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        ramp = np.clip((np.arange(size // 2) - low) / (high - low or 0.001), 0, 1)
        return plain_frequencies(base, size) * (ramp / self.factor + 1 - ramp), self._attention_factor()

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        both = self.mscale and self.mscale_all_dim
        return self._m(self.mscale) / self._m(self.mscale_all_dim) if both else self._m(1)

    @property
    def score_factor(self) -> float:
        """`m(mscale_all_dim)^2`: what reaches the channels that do not turn, which cosine and sine cannot."""
        return self._m(self.mscale_all_dim or 0) ** 2

    def _m(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1


class LongRoPE(Scaling):
    """Searched divisors for each pair, `f_j / lambda_j`: `short` for texts of up to `original` tokens and `long` for
    longer ones (Ding et al. 2024, arXiv:2402.13753, as in Phi-3).

    factor: how many times longer than `original` texts may be; cosine and sine are multiplied by
    `sqrt(1 + ln factor / ln original)`, or by attention_factor. Keys of a short text do not fit a long one.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    factor: float
    attention_factor: float | None = None

    def __post_init__(self):
        _check_original(self)
        require(self.factor > 0, self, "factor", "must be above 0")
        for field in ("short", "long"):
            require(all(value > 0 for value in getattr(self, field)), self, field, "must all be above 0")

    def check(self, size):
        for field in ("short", "long"):
            require(len(getattr(self, field)) == size // 2, self, field,
                    f"must be {size // 2} numbers, one for each pair of the {size} turned channels")

    def frequencies(self, base, size, context_length):
        f, short, long = plain_frequencies(base, size), np.asarray(self.short), np.asarray(self.long)
        return jnp.where(context_length > self.original, f / long, f / short), self._attention_factor()

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original)) if self.factor > 1 else 1.0


class Llama3Scaling(Scaling):
    """Llama 3.1's rule: wavelengths above `original / low` tokens are stretched by `factor`, those below
    `original / high` are left, and between the two the frequencies are blended (Grattafiori et al. 2024,
    arXiv:2407.21783, as in its released code). In Llama 4 low and high are equal, and nothing lies between."""

    factor: float
    low: float
    high: float
    original: int

    def __post_init__(self):
        _check_factor(self)
        _check_original(self)
        require(self.low > 0, self, "low", "must be above 0")
        require(self.high >= self.low, self, "high", f"must be at least low = {self.low}")

    def frequencies(self, base, size, context_length):
        f = plain_frequencies(base, size)
        turns = self.original * f / (2 * math.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low or 1e-9), 0, 1)
        return f * (kept + (1 - kept) / self.factor), 1.0


class ProportionalScaling(Scaling):
    """Only the first `share` of the pairs turn, at their frequencies in the full size, divided by `factor`; the
    others have frequency 0 and hold no place (Gemma 4). Unlike `Rotary(size=...)`, pairs span the whole head."""

    share: float
    factor: float = 1.0

    def __post_init__(self):
        _check_factor(self)
        require(0 < self.share <= 1, self, "share", "must be above 0 and at most 1")

    def frequencies(self, base, size, context_length):
        turning = np.arange(size // 2) < int(self.share * size // 2)
        return np.where(turning, plain_frequencies(base, size) / self.factor, 0), 1.0


def _stretch(factor, size: int) -> np.ndarray | jax.Array:
    """`factor^(-2j/(d-2))`: what a base of `factor^(d/(d-2))` times the old one makes of each frequency."""
    return factor ** (-np.arange(0, size, 2) / max(size - 2, 1))


def _check_factor(config: Scaling) -> None:
    require(config.factor >= 1, config, "factor", "must be at least 1")


def _check_original(config: Scaling) -> None:
    require(config.original > 1, config, "original", "must be a number of tokens, at least 2")
