"""HGRN2: gated linear attention whose keys are what the gates let go, with gates that open less the deeper they lie.

    f_t = b_l + (1 - b_l) sigmoid(x_t W_f)       S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T       y_t = N^(-1/2) q_t S_t

Qin et al. 2024 (arXiv:2404.07904), section 3; the lower bounds b_l of all layers are one table, a running sum of
shares of 1, from 0 in the first layer on: Qin et al. 2023, HGRN (arXiv:2311.04823), section 3.2. It belongs to no layer
and stands before them:

    Sequence(LowerBounds(), Repeat(Sequence(Residual(HGRN2(heads)), Residual(mlp)), layers))
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

BOUNDS = "lower_bounds"  # the published value, [layers, D]


class LowerBounds(LayerConfig):
    """The table of lower bounds, used by every HGRN2 layer that follows. The stream passes unchanged. Layers are
    counted as blocks of two residual branches."""

    def build(self, rngs: nnx.Rngs, at: Place) -> "LowerBoundsModule":
        return LowerBoundsModule(rngs, at)


class LowerBoundsModule(Layer):
    """Weight: logits [layers, D], 0 at first: the bounds then rise evenly."""

    def __init__(self, rngs: nnx.Rngs, at: Place):
        self.logits = parameter(rngs, "->.F", (max(at.depth // 2, 1), at.width))

    def __call__(self, x, tokens: Tokens, state=None):
        shares = jax.nn.softmax(wide(self.logits[...]), axis=0)
        return x, None, Aux(provides={BOUNDS: jnp.cumsum(shares, axis=0) - shares[0]})


class HGRN2(LayerConfig):
    """heads: H, each of K = N = D / H channels. form: of the recurrence; None to choose."""

    heads: int
    form: Form | None = None

    def __post_init__(self):
        require(self.heads >= 1, self, "heads", "must be at least 1")

    def check(self, width: int) -> None:
        require(width % self.heads == 0, self, "heads", f"must divide the width {width}")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "HGRN2Module":
        return HGRN2Module(self, rngs, at)


class HGRN2Module(Layer):
    """Weights: query, forget and value [D, H, K], norm [D], out [H, K, D]. layer [1] int32, no weight: the number of
    the layer, whose bounds it takes. Trace: forget [B, T], the mean of f."""

    def __init__(self, config: HGRN2, rngs: nnx.Rngs, at: Place):
        D, H, self.form = at.width, config.heads, config.form
        self.query, self.forget, self.value = (parameter(rngs, "D->HK", (D, H, D // H)) for _ in range(3))
        self.norm = NormModule(RMSNorm(), rngs, (D,), "->F")
        self.out = parameter(rngs, "HK->D", (H, D // H, D), scale=residual_scale(at))
        self.layer = nnx.Variable(jnp.full((1,), at.index // 2, jnp.int32))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        _, H, K = self.value.shape
        return MemoryState.zeros(batch, H, K, K, dtype)

    def __call__(self, x, tokens: Tokens, state: MemoryState | None = None):
        if BOUNDS not in tokens.provided:
            raise ValueError("HGRN2: no lower bounds were published; put a LowerBounds layer before the blocks, in the "
                             "Sequence that holds them")
        _, H, K = self.value.shape
        bound = tokens.provided[BOUNDS][self.layer[...]].reshape(H, 1, K)
        q, forget, v = (project(x, weight, "BTD,DHK->BHTK") for weight in (self.query, self.forget, self.value))
        forget = wide(forget)
        k = (1 - bound) * jax.nn.sigmoid(-forget)  # 1 - f
        # log f without the logarithm of a sum that may be 0, where the bound is
        floor = jnp.log(jnp.maximum(bound, 1e-30))
        log_decay = jnp.logaddexp(floor, jnp.log1p(-bound) + jax.nn.log_sigmoid(forget))

        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        y, new = channel_decay(jax.nn.silu(q) * K**-0.5, k, v, log_decay, tokens, past, form=self.form)
        y = jnp.swapaxes(y.astype(x.dtype), 1, 2)
        y = self.norm(y.reshape(x.shape)).reshape(y.shape)
        aux = Aux(traces={"forget": jnp.where(tokens.real, jnp.exp(log_decay).mean((1, 3)), 0)})
        return project(y, self.out, "BTHK,HKD->BTD"), None if state is None else new, aux
