"""Where a token stands and which step it is at: the signal of the Universal Transformer.

Dehghani et al. 2018 (arXiv:1807.03819), section 2.1, equations 4 and 5.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from archlab.layers.config import Config, require
from archlab.layers.contract import Tokens, wide
from archlab.layers.positions import sinusoids

OFFSET = 2**31 - 1  # folded into the key: no step has this number


class Coordinates(Config):
    """Sinusoids of the place i within the document and of the step t, added to the stream before each step:

        P[i, t, 2j] = sin(i / base^(2j/D)) + sin(t / base^(2j/D)),   P[i, t, 2j+1] = the same of cosines,

    times D^-0.5. The published model multiplies its embeddings by sqrt(D) instead; ours have standard deviation
    D^-0.5, so that the ratio of signal to stream is the published one. Places count from 0 and steps from 1.

    The paper's text has this fixed signal; its later code defaults to a learned vector per step.

    base: the longest wavelength over 2 pi. offset: in the training form each row's places begin at a random one from 0
    to this, so that places beyond the trained length are known (section 3.4 of the paper, on algorithmic tasks).
    """

    base: float = 10000.0
    offset: int = 0

    def __post_init__(self):
        require(self.base > 1, self, "base", "must be above 1")
        require(self.offset >= 0, self, "offset", "must be 0 (none) or a number of places")

    def signal(self, x: Float[Array, "B T D"], tokens: Tokens, step) -> Float[Array, "B T D"]:
        """P for each token of `x` at `step` (int from 0, may be traced), in the dtype of `x`; D must be even."""
        width, dtype, positions = x.shape[-1], wide(x).dtype, tokens.positions
        if self.offset and tokens.training is not None:  # the same at all steps, whose own keys are folded from this
            key = jax.random.fold_in(tokens.training.key, OFFSET)
            positions = positions + jax.random.randint(key, (x.shape[0], 1), 0, self.offset + 1)
        place = sinusoids(positions.astype(dtype), width, self.base)
        time = sinusoids((jnp.asarray(step) + 1).astype(dtype), width, self.base)
        return ((place + time) * width**-0.5).astype(x.dtype)
