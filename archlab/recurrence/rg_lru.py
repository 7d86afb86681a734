"""The recurrent block of Griffin and Hawk: a real-gated linear recurrent unit between two projections and a gate.

De et al. 2024 (arXiv:2402.19427), sections 2.3 and 2.4:

    r_t = sigmoid(W_a x_t + b_a)        i_t = sigmoid(W_x x_t + b_x)        log a_t = -8 r_t softplus(decay)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)

with gates that are block-diagonal. The paper writes a = sigmoid(Lambda); `decay` is -Lambda, as in the released code,
which also leaves the root out at the first token of a document: nothing was there before that it would have to share
the state with.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, near, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, document_starts, pytree, wide
from archlab.layers.mlp import add_bias, residual_scale
from archlab.recurrence.block_diagonal import block_diagonal, project_blocks
from archlab.recurrence.convolution import CausalConv, ConvState
from archlab.recurrence.diagonal import DiagonalState, diagonal
from archlab.recurrence.forms import Form

SHARPNESS = 8.0  # c: how far a gate moves a decay
STEEPEST = 1000.0  # the largest gradient of the root
INITS = ("paper", "code")


class RGLRU(LayerConfig):
    """`W_out (gelu(W_gate x) * RG-LRU(conv(W_into x)))`, with biases everywhere.

    channels: F, of the state; None for D. blocks: of the gates, which divide F. conv: the width of the convolution.
    init: of the decays: a^8, the smallest a_t can be, lies in [0.9, 0.999] ("paper"); or a does ("code": the released
    RecurrentGemma forgets that much faster at first). form: of the recurrence; None to choose.
    """

    blocks: int
    channels: int | None = None
    conv: int = 4
    init: str = "paper"
    form: Form | None = None

    def __post_init__(self):
        for field in ("blocks", "conv"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")
        require(self.channels is None or self.channels >= 1, self, "channels", "must be at least 1, or None for D")
        require(self.init in INITS, self, "init", near(str(self.init), INITS))

    def check(self, width: int) -> None:
        channels = self.channels or width
        require(channels % self.blocks == 0, self, "blocks", f"must divide the {channels} channels")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "RGLRUModule":
        return RGLRUModule(self, rngs, at)


@pytree
class RGLRUState:
    """conv: the convolution's last inputs; hidden: h, at least float32."""

    conv: ConvState
    hidden: DiagonalState


class RGLRUModule(Layer):
    """Weights: into and gate [D, F], conv, read and forget [blocks, F/blocks, F/blocks] (W_x and W_a), decay [F], merge
    [F, D]; and their biases. Trace: decay [B, T], the mean a_t over channels."""

    def __init__(self, config: RGLRU, rngs: nnx.Rngs, at: Place):
        D, F, W = at.width, config.channels or at.width, config.conv
        blocks, K = config.blocks, F // config.blocks
        self.into, self.into_bias = parameter(rngs, "D->F", (D, F)), parameter(rngs, "->F", (F,))
        self.gate, self.gate_bias = parameter(rngs, "D->F", (D, F)), parameter(rngs, "->F", (F,))
        self.conv = CausalConv(W, F, rngs)
        self.conv.weight = parameter(rngs, "->.F", (W, F), nnx.initializers.normal(0.1 * W**-0.5), decay=True)
        self.conv.bias = parameter(rngs, "->F", (F,))
        self.read, self.forget = block_diagonal(rngs, blocks, F), block_diagonal(rngs, blocks, F)
        self.read_bias = parameter(rngs, "->..", (blocks, K))
        self.forget_bias = parameter(rngs, "->..", (blocks, K))
        self.decay = parameter(rngs, "->F", (F,), _decays if config.init == "code" else _slow_decays)
        self.merge = parameter(rngs, "F->D", (F, D), scale=2 * residual_scale(at))  # its variance is 2 / (layers F)
        self.merge_bias = parameter(rngs, "->D", (D,))
        self.form = config.form

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return RGLRUState(self.conv.init_state(batch, dtype), DiagonalState.zeros(batch, self.decay.size, dtype))

    def __call__(self, x, tokens: Tokens, state: RGLRUState | None = None):
        gate = add_bias(project(x, self.gate, "BTD,DF->BTF"), self.gate_bias)
        u = add_bias(project(x, self.into, "BTD,DF->BTF"), self.into_bias)
        u, conv = self.conv(u, tokens, None if state is None else state.conv)

        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        starts, _ = document_starts(tokens.segments, past.hidden.segment)
        log_a = -SHARPNESS * self._sigmoid(u, self.forget, self.forget_bias) * jax.nn.softplus(wide(self.decay[...]))
        share = jnp.where(starts[:, :, None], 1, bounded_sqrt(-jnp.expm1(2 * log_a)))
        a, b = jnp.exp(log_a), share * self._sigmoid(u, self.read, self.read_bias) * u
        h, hidden = diagonal(a, b, tokens, past.hidden, self.form)

        y = jax.nn.gelu(gate, approximate=True) * h.astype(x.dtype)
        y = add_bias(project(y, self.merge, "BTF,FD->BTD"), self.merge_bias)
        aux = Aux(traces={"decay": jnp.where(tokens.real, a.mean(-1), 0)})
        return y, None if state is None else RGLRUState(conv, hidden), aux

    def _sigmoid(self, u, weight, bias):
        """A gate [B, T, F], at least float32."""
        return jax.nn.sigmoid(add_bias(project_blocks(u, weight), bias)).reshape(u.shape)


@jax.custom_vjp
def bounded_sqrt(x: jax.Array) -> jax.Array:
    """The root, with a gradient of at most `STEEPEST`: where a_t rounds to 1 it would be infinite."""
    return jnp.sqrt(x)


bounded_sqrt.defvjp(lambda x: (jnp.sqrt(x), x),
                    lambda x, g: (g / jnp.sqrt(jnp.maximum(4 * x, STEEPEST**-2)),))


def _from_log(log_a):
    """softplus^-1(-log a)."""
    return jnp.log(jnp.expm1(-log_a))


def _decays(key, shape, dtype, low: float = 0.9, high: float = 0.999):
    """a with a^2 uniform in [low^2, high^2]: uniform on a ring of the complex plane."""
    return _from_log(0.5 * jnp.log(jax.random.uniform(key, shape, dtype, low**2, high**2)))


def _slow_decays(key, shape, dtype, low: float = 0.9, high: float = 0.999):
    """a with a^8 uniform in [low, high]."""
    return _from_log(jnp.log(jax.random.uniform(key, shape, dtype, low, high)) / SHARPNESS)
