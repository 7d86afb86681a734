"""The mLSTM: a matrix memory under exponential gates, and the block it lives in (Beck et al. 2024, xLSTM,
arXiv:2405.04517, sections 2.3 and 2.4).

    C_t = f_t C_{t-1} + i_t k_t v_t^T        n_t = f_t n_{t-1} + i_t k_t        h_t = q_t C_t / max(|q_t n_t|, 1)

with f = sigmoid and i = exp of what the gates see. Exponentials overflow; so the memory is kept divided by exp(m), with
m_t = max(log f_t + m_{t-1}, log i_t) (equation 15). Then no factor is above 1, the result is the same, and the memory
is a `scalar_decay` whose values have one more column, of ones: the normaliser.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, document_starts, pytree
from archlab.layers.mlp import add_bias
from archlab.layers.norms import LayerNorm, NormModule
from archlab.recurrence.block_diagonal import block_diagonal, project_blocks
from archlab.recurrence.convolution import CausalConv, ConvState
from archlab.recurrence.forms import Form
from archlab.recurrence.memory import MemoryState
from archlab.recurrence.scalar_decay import scalar_decay

EPS = 1e-6  # keeps the division finite where m is large
BLOCK = 4  # channels that queries, keys and values are mixed over


@pytree
class CellState:
    """memory: C and n, as its last column, divided by exp(scale); scale [B, H]: m of each row's last document."""

    memory: MemoryState
    scale: Float[Array, "B H"]

    @classmethod
    def zeros(cls, batch: int, heads: int, keys: int, values: int, dtype) -> "CellState":
        memory = MemoryState.zeros(batch, heads, keys, values + 1, dtype)
        return cls(memory, jnp.zeros((batch, heads), memory.matrix.dtype))


def mlstm(q: Float[Array, "B H T N"], k: Float[Array, "B H T N"], v: Float[Array, "B H T P"],
          i: Float[Array, "B H T"], f: Float[Array, "B H T"], tokens: Tokens, state: CellState,
          eps: float = EPS, form: Form | None = None):
    """The cell over a piece.

    Args: i, f: what the gates see, before their exponential and sigmoid. Keys are scaled by N^-0.5 here.
    Returns: h [B, H, T, P] in the dtype of the state, and the state after the piece.
    """
    dtype, real = state.scale.dtype, tokens.real[:, None, :]
    i = jnp.where(real, i.astype(dtype), -jnp.inf)  # padding writes nothing and forgets nothing
    log_f = jnp.where(real, jax.nn.log_sigmoid(f.astype(dtype)), 0)
    before, m = stabilisers(log_f, i, tokens, state)
    k = k.astype(dtype) * (jnp.exp(i - m) * k.shape[-1] ** -0.5)[..., None]
    v = jnp.concatenate([v.astype(dtype), jnp.ones_like(v[..., :1], dtype)], -1)
    y, memory = scalar_decay(q, k, v, log_f + before - m, tokens, state.memory, form)
    h = y[..., :-1] / (jnp.maximum(jnp.abs(y[..., -1]), jnp.exp(-m)) + eps)[..., None]
    return h, CellState(memory, m[:, :, -1])


def stabilisers(log_f: Float[Array, "B H T"], i: Float[Array, "B H T"], tokens: Tokens, state: CellState):
    """m_{t-1} and m_t, each [B, H, T]: 0 before a document's first token, and left alone by padding.

    They have no gradient: the cell's result does not depend on them (but by `eps`).
    """
    starts, _ = document_starts(tokens.segments, state.memory.segment)
    starts = starts[:, None, :]
    # m -> max(m + shift, floor) is what one token does, and also what many do.
    shift, floor = jnp.where(starts, -jnp.inf, log_f), jnp.where(starts, jnp.maximum(log_f, i), i)
    then = lambda a, b: (a[0] + b[0], jnp.maximum(a[1] + b[0], b[1]))
    shift, floor = jax.lax.associative_scan(then, jax.lax.stop_gradient((shift, floor)), axis=2)
    first = jax.lax.stop_gradient(state.scale)[:, :, None]
    m = jnp.maximum(first + shift, floor)
    return jnp.where(starts, 0, jnp.concatenate([first, m[:, :, :-1]], 2)), m


class MLSTM(LayerConfig):
    """The mLSTM block of the paper (figure 11): projected up; queries and keys from a short convolution, values past
    it, each through a block-diagonal matrix; the cell; a skip; a gate; projected down.

    heads: H. expand: F = expand * D. conv: the width of the convolution. form: of the recurrence; None to choose.
    """

    heads: int
    expand: int = 2
    conv: int = 4
    form: Form | None = None

    def __post_init__(self):
        for field in ("heads", "expand", "conv"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")

    def check(self, width: int) -> None:
        channels = self.expand * width
        require(channels % self.heads == 0, self, "heads", f"must divide the {channels} channels")
        require(channels % BLOCK == 0, self, "expand", f"the {channels} channels must divide into blocks of {BLOCK}")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "MLSTMModule":
        return MLSTMModule(self, rngs, at)


@pytree
class MLSTMState:
    """conv: the convolution's last inputs; cell: the memory, at least float32."""

    conv: ConvState
    cell: CellState


class MLSTMModule(Layer):
    """Weights: into and gate [D, F], conv, query, key and value [F/4, 4, 4], input_gate and forget_gate [3, F, H] and
    their biases [H], norm [H, P], skip [F], out [F, D]. Trace: forget [B, T], the mean of sigmoid(f) over heads."""

    def __init__(self, config: MLSTM, rngs: nnx.Rngs, at: Place):
        D, F, H = at.width, config.expand * at.width, config.heads
        small = nnx.initializers.normal((2 / (5 * D)) ** 0.5)
        self.into, self.gate = parameter(rngs, "D->F", (D, F), small), parameter(rngs, "D->F", (D, F), small)
        self.conv = CausalConv(config.conv, F, rngs)
        self.query, self.key, self.value = (block_diagonal(rngs, F // BLOCK, F, small) for _ in range(3))
        self.input_gate = parameter(rngs, ".F->H", (3, F, H), nnx.initializers.zeros)
        self.forget_gate = parameter(rngs, ".F->H", (3, F, H), nnx.initializers.zeros)
        self.input_bias = parameter(rngs, "->H", (H,), nnx.initializers.normal(0.1))
        self.forget_bias = parameter(rngs, "->H", (H,), forget_bias)
        self.norm = NormModule(LayerNorm(bias=False), rngs, (H, F // H), "->HK")
        self.skip = parameter(rngs, "->F", (F,), nnx.initializers.ones)
        self.out = parameter(rngs, "F->D", (F, D), wang(at))
        self.form = config.form

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        H, P = self.norm.scale.shape
        return MLSTMState(self.conv.init_state(batch, dtype), CellState.zeros(batch, H, P, P, dtype))

    def __call__(self, x, tokens: Tokens, state: MLSTMState | None = None):
        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        inner = project(x, self.into, "BTD,DF->BTF")
        mixed, conv = self.conv(inner, tokens, None if state is None else state.conv)
        mixed = jax.nn.silu(mixed)
        q, k, v = (project_blocks(a, w).reshape(inner.shape) for a, w in (
            (mixed, self.query), (mixed, self.key), (inner, self.value)))
        sees = jnp.stack([q, k, v], 2)
        i, f = (add_bias(project(sees, w, "BTCF,CFH->BTH"), b) for w, b in (
            (self.input_gate, self.input_bias), (self.forget_gate, self.forget_bias)))

        heads = lambda a: jnp.moveaxis(a.reshape(*a.shape[:2], *self.norm.scale.shape), 2, 1)
        h, cell = mlstm(*map(heads, (q, k, v)), jnp.swapaxes(i, 1, 2), jnp.swapaxes(f, 1, 2), tokens, past.cell,
                        form=self.form)
        h = self.norm(jnp.moveaxis(h, 1, 2)).reshape(x.shape[0], x.shape[1], -1).astype(x.dtype)
        y = (h + self.skip[...].astype(x.dtype) * mixed) * jax.nn.silu(project(x, self.gate, "BTD,DF->BTF"))
        aux = Aux(traces={"forget": jnp.where(tokens.real, jax.nn.sigmoid(f).mean(-1), 0)})
        return project(y, self.out, "BTF,FD->BTD"), None if state is None else MLSTMState(conv, cell), aux


def forget_bias(key, shape, dtype):
    """From 3 to 6 over the heads: they remember for 20 to 400 tokens at first."""
    return jnp.linspace(3, 6, shape[-1], dtype=dtype)


def wang(at: Place, branches: int = 1):
    """What leads back to the stream: standard deviation 2 / (blocks sqrt(D)), of blocks of so many branches."""
    return nnx.initializers.normal(2 * branches / (at.sharers * at.width**0.5))
