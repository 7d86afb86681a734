"""How fast a model answers: time to the first token, and tokens a second after it."""

import dataclasses
import statistics
import time

import jax

from archlab.inference.generation import generate
from archlab.layers.repeat import unstack
from archlab.model import Model


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians of repeated runs, compilation apart. first_token: seconds from the prompt to its next token (TTFT).
    per_token: seconds for each further one (TPOT). compile: seconds that the first run took beyond the median."""

    first_token: float
    per_token: float
    compile: float

    @property
    def tokens_per_second(self) -> float:
        """Of one row, after its first token."""
        return 1 / self.per_token


def time_generation(model: Model, context: int, new_tokens: int = 64, batch: int = 1, repeats: int = 3) -> Timing:
    """Times greedy generation after prompts of `context` tokens, every result waited for."""
    apart = unstack(model)
    prompt = jax.random.randint(jax.random.key(0), (batch, context), 0, model.config.vocab)

    def seconds(new: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(generate(apart, prompt, new, temperature=0))
        return time.perf_counter() - began

    cold = seconds(1) + seconds(1 + new_tokens)
    while True:
        first, whole = (statistics.median(column) for column in
                        zip(*((seconds(1), seconds(1 + new_tokens)) for _ in range(repeats))))
        if whole > 1.5 * first or new_tokens >= 1024:
            break
        new_tokens *= 4  # so few tokens vanish in the noise of the prefill
    if whole <= first:
        raise ValueError(f"{new_tokens} further tokens took no measurable time: the machine is too busy to measure")
    return Timing(first, (whole - first) / new_tokens, max(cold - first - whole, 0.0))
