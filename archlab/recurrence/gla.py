"""Gated linear attention: a matrix state whose key channels each forget at a rate that the token says.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        y_t = N^(-1/2) q_t S_t        a_t = sigmoid(x_t W_1 W_2 + b)^(1/16)

Yang et al. 2023 (arXiv:2312.06635), section 4.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, wide
from archlab.layers.mlp import residual_scale
from archlab.layers.norms import NormModule, RMSNorm
from archlab.recurrence.channel_decay import channel_decay
from archlab.recurrence.forms import Form
from archlab.recurrence.memory import MemoryState


class GatedLinearAttention(LayerConfig):
    """Linear attention with decays of low rank and a SiLU gate.

    heads: H. key_size: N; None for D / 2H. value_size: P; None for D / H. rank: of the map to the decays. temperature:
    their logarithms are divided by it, so that at first little is forgotten. form: of the recurrence; None to choose.
    """

    heads: int
    key_size: int | None = None
    value_size: int | None = None
    rank: int = 16
    temperature: float = 16.0
    form: Form | None = None

    def __post_init__(self):
        for field in ("heads", "rank"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")
        for field in ("key_size", "value_size"):
            size = getattr(self, field)
            require(size is None or size >= 1, self, field, "must be at least 1, or None")
        require(self.temperature > 0, self, "temperature", "must be above 0")

    def check(self, width: int) -> None:
        for field, parts in (("key_size", 2 * self.heads), ("value_size", self.heads)):
            require(getattr(self, field) is not None or width % parts == 0, self, field,
                    f"the width {width} does not divide by {parts}; give a size")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "GatedLinearAttentionModule":
        return GatedLinearAttentionModule(self, rngs, at)


class GatedLinearAttentionModule(Layer):
    """Weights: query and key [D, H, N], value and gate [D, H, P], out [H, P, D]; forget_down [D, R], forget_up
    [R, H, N] and forget_bias [H, N], to the decays; norm [P], shared by all heads."""

    def __init__(self, config: GatedLinearAttention, rngs: nnx.Rngs, at: Place):
        D, H, R, self.config = at.width, config.heads, config.rank, config
        N, P = config.key_size or D // (2 * H), config.value_size or D // H
        into = lambda K: parameter(rngs, "D->HK", (D, H, K))
        self.query, self.key, self.value, self.gate = into(N), into(N), into(P), into(P)
        self.forget_down = parameter(rngs, "D->.", (D, R))
        self.forget_up = parameter(rngs, ".->HK", (R, H, N))
        self.forget_bias = parameter(rngs, "->HK", (H, N))
        self.norm = NormModule(RMSNorm(), rngs, (P,), "->K")
        self.out = parameter(rngs, "HK->D", (H, P, D), scale=residual_scale(at))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return MemoryState.zeros(batch, *self.key.shape[1:], self.value.shape[2], dtype)

    def __call__(self, x, tokens: Tokens, state: MemoryState | None = None):
        into = lambda weight: project(x, weight, "BTD,DHK->BHTK")
        q, k, v = into(self.query) * self.key.shape[2] ** -0.5, into(self.key), into(self.value)
        forget = project(project(x, self.forget_down, "BTD,DR->BTR"), self.forget_up, "BTR,RHN->BHTN")
        log_decay = jax.nn.log_sigmoid(wide(forget) + self.forget_bias[...][:, None]) / self.config.temperature

        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        y, new = channel_decay(q, k, v, log_decay, tokens, past, form=self.config.form)
        y = self.norm(y.astype(x.dtype)) * jax.nn.silu(into(self.gate))
        return project(y, self.out, "BHTP,HPD->BTD"), None if state is None else new, Aux()
