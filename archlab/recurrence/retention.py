"""Retention: attention without its softmax, under a decay that each head has for itself.

Sun et al. 2023, RetNet (arXiv:2307.08621), section 2. With queries and keys turned by their places, head h computes

    S_t = gamma_h S_{t-1} + k_t v_t^T        y_t = q_t S_t        gamma_h = 1 - 2^(-5-h)

which is the parallel form ((Q K^T) * D) V with D_ts = gamma^(t-s) for s <= t. The published code also divides its
scores by row sums; the norm that follows takes that out again, so it is left out here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from archlab.attention.positions import rotate, waves
from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, wide
from archlab.layers.norms import RMSNorm
from archlab.recurrence.forms import Form
from archlab.recurrence.memory import MemoryState
from archlab.recurrence.scalar_decay import scalar_decay


class Retention(LayerConfig):
    """Multi-scale retention with a SiLU gate.

    heads: H. expand: values are `expand` times as wide as the stream; queries and keys are as wide. form: of the
    recurrence; None to choose.
    """

    heads: int
    expand: int = 2
    form: Form | None = None

    def __post_init__(self):
        for field in ("heads", "expand"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")

    @property
    def recurrent(self) -> bool:
        return True

    def check(self, width: int) -> None:
        require(width % (2 * self.heads) == 0, self, "heads",
                f"must divide the width {width} into heads of an even size, since channels are turned in pairs")

    def build(self, rngs: nnx.Rngs, at: Place) -> "RetentionModule":
        return RetentionModule(self, rngs, at)


class RetentionModule(Layer):
    """Weights: query and key [D, H, N], value and gate [D, H, P], out [H, P, D]; the norm has none."""

    def __init__(self, config: Retention, rngs: nnx.Rngs, at: Place):
        D, H = at.width, config.heads
        N, P = D // H, config.expand * D // H
        into = lambda K: parameter(rngs, "D->HK", (D, H, K), xavier(2**-2.5, 0, (1, 2)))
        self.query, self.key, self.value, self.gate = into(N), into(N), into(P), into(P)
        self.out = parameter(rngs, "HK->D", (H, P, D), xavier(1, (0, 1), 2))
        self.norm, self.form = RMSNorm(gain=False), config.form

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        _, H, N = self.key.shape
        return MemoryState.zeros(batch, H, N, self.value.shape[2], dtype)

    def __call__(self, x, tokens: Tokens, state: MemoryState | None = None):
        _, H, N = self.key.shape
        q, k = (wide(project(x, weight, "BTD,DHN->BHTN")) for weight in (self.query, self.key))
        turn = waves(tokens.positions, 10000.0 ** -np.linspace(0, 1, N // 2), q.dtype)
        q, k = rotate(q, *turn, interleaved=True), rotate(k * N**-0.5, *turn, interleaved=True)
        v = project(x, self.value, "BTD,DHP->BHTP")
        decay = jnp.broadcast_to(log_gammas(H)[:, None].astype(q.dtype), v.shape[:3])

        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        y, new = scalar_decay(q, k, v, decay, tokens, past, self.form)
        y = self.norm.normalise(y).astype(x.dtype) * jax.nn.silu(project(x, self.gate, "BTD,DHP->BHTP"))
        return project(y, self.out, "BHTP,HPD->BTD"), None if state is None else new, Aux()


def log_gammas(heads: int) -> np.ndarray:
    """ln(gamma_h) of each head, [H]."""
    return np.log1p(-(2.0 ** (-5 - np.arange(heads))))


def xavier(gain: float, inputs, outputs):
    """Uniform within gain * sqrt(6 / (fan_in + fan_out)), over these axes."""
    return nnx.initializers.variance_scaling(gain**2, "fan_avg", "uniform", inputs, outputs)
