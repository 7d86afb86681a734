"""From logits to the next token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from archlab.layers.contract import pytree


@pytree
class Sampling:
    """How a token is drawn. Each setting looks at what those before it left, in the order of transformers.

    repetition_penalty: logits of tokens that the row has had are divided by it where positive and multiplied where
      negative, so that above 1 they become less likely (Keskar et al. 2019, arXiv:1909.05858, 4.1); None for none. The
      prompt counts, padding does not.
    temperature: divides the logits; 0 takes the likeliest token (the first of equals), and what follows does nothing.
    top_k: keep this many of the likeliest tokens (Fan et al. 2018, arXiv:1805.04833); None for all.
    top_p: of those keep the fewest whose probabilities, renormalised, reach `top_p` (nucleus sampling, Holtzman et al.
      2020, arXiv:1904.09751), at least one; None for all.
    min_p: keep those at least `min_p` times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082).

    Numbers may be traced, so that another value is not another program; only another `top_k` is.
    """

    temperature: float = 0.8
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def check(self, vocab: int) -> None:
        """Raises ValueError naming the setting, its value and what would be right."""
        def require(right: bool, name: str, what: str):
            if not right:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must {what}")

        top_k, top_p, min_p, penalty = self.top_k, self.top_p, self.min_p, self.repetition_penalty
        require(_number(self.temperature) and self.temperature >= 0, "temperature",
                "be a finite number, 0 (greedy) or above")
        require(top_k is None or isinstance(top_k, int) and 1 <= top_k <= vocab, "top_k",
                f"be a whole number from 1 to the vocabulary's {vocab}, or None")
        require(top_p is None or _number(top_p) and 0 < top_p <= 1, "top_p", "lie in (0, 1], or be None")
        require(min_p is None or _number(min_p) and 0 <= min_p <= 1, "min_p", "lie in [0, 1], or be None")
        require(penalty is None or _number(penalty) and penalty > 0, "repetition_penalty",
                "be a finite number above 0 (1 changes nothing), or None")

    def as_arrays(self) -> "Sampling":
        """The same for a compiled program: numbers as float32 arrays, and nothing that a greedy choice does not use."""
        number = lambda x: None if x is None else np.float32(x)
        if self.temperature == 0:
            return Sampling(temperature=None, repetition_penalty=number(self.repetition_penalty))
        return Sampling(number(self.temperature), self.top_k, number(self.top_p), number(self.min_p),
                        number(self.repetition_penalty))


def sample(logits: Float[Array, "B V"], key: jax.Array | None, sampling: Sampling,
           seen: Bool[Array, "B V"] | None = None) -> Int[Array, "B"]:
    """Draws a token for each row.

    Args: key: a typed PRNG key, not used where the choice is greedy. seen: the tokens that each row has had, which only
      a `repetition_penalty` needs.
    """
    if sampling.repetition_penalty is not None:
        logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature is None or isinstance(sampling.temperature, (int, float)) and sampling.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits, tokens = candidates(logits, sampling)
    choice = jax.random.categorical(key, logits)
    return (choice if tokens is None else jnp.take_along_axis(tokens, choice[:, None], 1)[:, 0]).astype(jnp.int32)


def penalised(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty) -> Float[Array, "B V"]:
    """The logits after a `repetition_penalty`."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def candidates(logits: Float[Array, "B V"], sampling: Sampling):
    """What may be drawn: logits [B, K], -inf for what may not, and their tokens [B, K] (None where they are all V)."""
    logits, tokens = logits / sampling.temperature, None
    if sampling.top_k is not None or sampling.top_p is not None:
        logits, tokens = jax.lax.top_k(logits, sampling.top_k or logits.shape[-1])  # likeliest first
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities  # the mass before each token
        logits = jnp.where((likelier < sampling.top_p).at[:, 0].set(True), logits, -jnp.inf)
    if sampling.min_p is not None:
        likeliest = logits.max(-1, keepdims=True)
        logits = jnp.where(logits - likeliest >= jnp.log(sampling.min_p), logits, -jnp.inf)
    return logits, tokens


def _number(x) -> bool:
    return isinstance(x, (int, float, np.number)) and math.isfinite(x)
