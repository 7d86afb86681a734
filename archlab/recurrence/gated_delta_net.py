"""Gated DeltaNet: the delta rule on a memory that also fades, as fast as the token wants.

    S'_t = exp(g_t) S_{t-1}        S_t = S'_t + beta_t k_t (v_t - k_t S'_t)^T        y_t = q_t S_t

Yang, Kautz & Hatamizadeh 2024 (arXiv:2412.06464), section 3; the decay is Mamba-2's, `g = -A softplus(x W + b)` for
each head, and a SiLU gate acts after the norm.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameter, project
from archlab.layers.contract import Place, wide
from archlab.recurrence.delta_net import DeltaNet, DeltaNetModule, one_per_head
from archlab.recurrence.step_size import step_bias

LEAST_RATE, LARGEST_RATE = 1e-2, 16.0  # of A when drawn: published from 0 on, where its logarithm ends


class GatedDeltaNet(DeltaNet):
    """The gated delta rule behind short convolutions; fields as `DeltaNet`'s, values twice as wide as keys."""

    key_size: int = 256
    value_size: int = 512

    def build(self, rngs: nnx.Rngs, at: Place) -> "GatedDeltaNetModule":
        return GatedDeltaNetModule(self, rngs, at)


class GatedDeltaNetModule(DeltaNetModule):
    """The weights of `DeltaNetModule`, and step [D, H], dt_bias and A_log [H]; gate [D, H, P]."""

    def __init__(self, config: GatedDeltaNet, rngs: nnx.Rngs, at: Place):
        super().__init__(config, rngs, at)
        D, H, P = self.value.shape
        rates = lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, LEAST_RATE, LARGEST_RATE))
        self.step = parameter(rngs, "D->H", (D, H))
        self.dt_bias = parameter(rngs, "->H", (H,), step_bias)
        self.A_log = parameter(rngs, "->H", (H,), rates)
        self.gate = parameter(rngs, "D->HK", (D, H, P))

    def log_decay(self, x):
        dt = jax.nn.softplus(one_per_head(x, self.step) + self.dt_bias[...][:, None])
        return -jnp.exp(wide(self.A_log[...]))[:, None] * dt

    def finish(self, y, x):
        return self.norm(y) * jax.nn.silu(project(x, self.gate, "BTD,DHP->BHTP"))
