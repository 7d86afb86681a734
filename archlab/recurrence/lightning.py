"""Lightning attention: linear attention under decays that are fixed for each head and layer.

    S_t = exp(-s_h) S_{t-1} + k_t v_t^T        y_t = q_t S_t        out = W_o (sigmoid(W_g x) * norm(y))

Qin et al. 2024 (arXiv:2401.04658); as here, with SiLU on queries, keys and values and the norm over all heads
together: MiniMax-01 (arXiv:2501.08313), section 2.2. The slopes s_h follow either paper.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import Config, LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens
from archlab.layers.mlp import residual_scale
from archlab.layers.norms import Norm, NormModule, RMSNorm
from archlab.recurrence.forms import Form
from archlab.recurrence.memory import MemoryState
from archlab.recurrence.scalar_decay import scalar_decay


class Slopes(Config):
    """Base of the rules by which heads and layers forget."""

    def of(self, heads: int, layer: int | Int[Array, "1"], layers: int) -> Float[Array, "H"]:
        """s_h >= 0 of each head in `layer` of `layers`, counted from 0."""
        raise TypeError(f"{type(self).__name__} does not say how its slopes are made")


class GeometricSlopes(Slopes):
    """ALiBi's powers, `2^(-8 (h + 1) / H)`, nearly gone in the last layer (MiniMax-01's code, TransNormerLLM's too)."""

    def of(self, heads, layer, layers):
        return 2 ** (-8 * (1 + jnp.arange(heads)) / heads) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)


class LinearSlopes(Slopes):
    """`8 h / H (1 - l / L)`: the first head forgets nothing (TransNormerLLM, arXiv:2307.14995, section 3.1)."""

    def of(self, heads, layer, layers):
        return 8 * jnp.arange(heads) / heads * (1 - layer / layers)


class LightningAttention(LayerConfig):
    """heads: H. head_size: K; None for D / H. slopes: how fast each head forgets; layers are counted as blocks of two
    residual branches. norm: over the H K channels. form: of the recurrence; None to choose."""

    heads: int
    head_size: int | None = None
    slopes: Slopes = GeometricSlopes()
    norm: Norm = RMSNorm()
    form: Form | None = None

    def __post_init__(self):
        require(self.heads >= 1, self, "heads", "must be at least 1")
        require(self.head_size is None or self.head_size >= 1, self, "head_size", "must be at least 1, or None")

    def check(self, width: int) -> None:
        require(self.head_size is not None or width % self.heads == 0, self, "heads",
                f"must divide the width {width}, or head_size be given")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "LightningAttentionModule":
        return LightningAttentionModule(self, rngs, at)


class LightningAttentionModule(Layer):
    """Weights: query, key, value and gate [D, H, K], out [H, K, D]; norm [H K]. layer [1] int32, no weight: the number
    of the layer, on which its slopes depend."""

    def __init__(self, config: LightningAttention, rngs: nnx.Rngs, at: Place):
        D, H, self.form = at.width, config.heads, config.form
        K = config.head_size or D // H
        self.query, self.key, self.value, self.gate = (parameter(rngs, "D->HK", (D, H, K)) for _ in range(4))
        self.norm = NormModule(config.norm, rngs, (H * K,), "->F")
        self.out = parameter(rngs, "HK->D", (H, K, D), scale=residual_scale(at))
        self.slopes, self.layers = config.slopes, max(at.depth // 2, 1)
        self.layer = nnx.Variable(jnp.full((1,), at.index // 2, jnp.int32))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        _, H, K = self.key.shape
        return MemoryState.zeros(batch, H, K, K, dtype)

    def __call__(self, x, tokens: Tokens, state: MemoryState | None = None):
        q, k, v = (jax.nn.silu(project(x, weight, "BTD,DHK->BHTK")) for weight in (self.query, self.key, self.value))
        slopes = self.slopes.of(q.shape[1], self.layer[...], self.layers)
        log_decay = jnp.broadcast_to(-slopes[:, None], q.shape[:3])
        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        y, new = scalar_decay(q, k, v, log_decay, tokens, past, self.form)
        gate = jax.nn.sigmoid(project(x, self.gate, "BTD,DHK->BTHK"))
        y = jnp.swapaxes(y.astype(x.dtype), 1, 2)
        y = gate * self.norm(y.reshape(*y.shape[:2], -1)).reshape(y.shape)
        return project(y, self.out, "BTHK,HKD->BTD"), None if state is None else new, Aux()
