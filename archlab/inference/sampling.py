"""From logits to the next token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sample(logits: Float[Array, "B V"], key: jax.Array | None, temperature=1.0, top_k: int | None = None,
           top_p=None) -> Int[Array, "B"]:
    """Draws a token for each row.

    Args:
      key: a typed PRNG key; not used where the choice is greedy.
      temperature: divides the logits; 0 or None takes the likeliest token (the first of equals).
      top_k: keep this many of the likeliest tokens (Fan et al. 2018, arXiv:1805.04833); None for all.
      top_p: of those keep the fewest whose probabilities, renormalised, reach `top_p` (nucleus sampling, Holtzman et
        al. 2020, arXiv:1904.09751), at least one; None for all.

    `temperature` and `top_p` may be traced, so that another value is not another program; `check_sampling` judges
    them outside.
    """
    if temperature is None or isinstance(temperature, (int, float)) and temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k is None and top_p is None:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    logits, tokens = jax.lax.top_k(logits, top_k or logits.shape[-1])  # likeliest first
    if top_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities  # the mass before each token
        keep = (likelier < top_p).at[:, 0].set(True)
        logits = jnp.where(keep, logits, -jnp.inf)
    choice = jax.random.categorical(key, logits)
    return jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def check_sampling(vocab: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> None:
    """Raises ValueError naming the setting of `sample`, its value and what would be right."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature = {temperature!r}: must be a finite number, 0 (greedy) or above")
    if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= vocab):
        raise ValueError(f"top_k = {top_k!r}: must be a whole number from 1 to the vocabulary's {vocab}, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p!r}: must lie in (0, 1], or be None")
