"""The sLSTM: a scalar memory under exponential gates that see the output of the token before (Beck et al. 2024, xLSTM,
arXiv:2405.04517, section 2.2).

    (i, f, z, o)_t = W x_t + R h_{t-1} + b
    c_t = f_t c_{t-1} + i_t tanh(z_t)        n_t = f_t n_{t-1} + i_t        h_t = sigmoid(o_t) c_t / n_t

with f = sigmoid, i = exp, and R block-diagonal: the cells of a head mix. Through R this is no linear recurrence: no
form is parallel in time, and tokens run one after another on every device. That is what it is for: it can keep track of
a state (parity, say) that linear recurrences with positive decays cannot.

c and n are kept divided by exp(m), with m_t = max(log f_t + m_{t-1}, log i_t), so that no exponential overflows.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from archlab.layers.alphabet import parameter
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, document_starts, pytree
from archlab.layers.norms import LayerNorm, NormModule
from archlab.layers.sharding import per_shard
from archlab.recurrence.block_diagonal import block_diagonal, project_blocks
from archlab.recurrence.convolution import CausalConv, ConvState
from archlab.recurrence.memory import dot

CHUNK = 64  # steps between the states that are kept for the backward pass
LOWEST = -1e30  # m before the first token: below everything, and yet a number


class SLSTM(LayerConfig):
    """The sLSTM layer: input and forget gate see a short convolution of the stream, the rest the stream itself. A gated
    MLP of its own follows it (figure 10).

    heads: H. conv: the width of the convolution.
    """

    heads: int
    conv: int = 4

    def __post_init__(self):
        for field in ("heads", "conv"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")

    def check(self, width: int) -> None:
        require(width % self.heads == 0, self, "heads", f"must divide the width {width}")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "SLSTMModule":
        return SLSTMModule(self, rngs, at)


@pytree
class SLSTMState:
    """conv: the convolution's last inputs; cells [4, B, H, K]: h, c, n, m, at least float32; segment [B]: the last
    document met."""

    conv: ConvState
    cells: Float[Array, "4 B H K"]
    segment: Int[Array, "B"]


class SLSTMModule(Layer):
    """Weights: conv; input_gate, forget_gate, value and output_gate [H, K, K]; recurrent [4, H, K, K] and bias
    [4, H, K], of the four in this order; norm [H, K]. There is no projection out.

    The authors' code gives the projection called `fgate` to the input gate and `igate` to the forget gate when it runs
    over a sequence, and not when it decodes: weights trained with it want these two exchanged.
    """

    def __init__(self, config: SLSTM, rngs: nnx.Rngs, at: Place):
        D, H = at.width, config.heads
        K = D // H
        small = nnx.initializers.normal((2 / (5 * D)) ** 0.5)
        self.conv = CausalConv(config.conv, D, rngs)
        self.input_gate, self.forget_gate, self.value, self.output_gate = (
            block_diagonal(rngs, H, D, small) for _ in range(4))
        self.recurrent = parameter(rngs, "LL.->K", (4, H, K, K), nnx.initializers.zeros)
        self.bias = parameter(rngs, "->.HK", (4, H, K), _bias(at))
        self.norm = NormModule(LayerNorm(bias=False), rngs, (H, K), "->HK")

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        cells = jnp.zeros((4, batch, *self.bias.shape[1:]), jnp.promote_types(dtype, jnp.float32)).at[3].set(LOWEST)
        return SLSTMState(self.conv.init_state(batch, dtype), cells, jnp.zeros((batch,), jnp.int32))

    def __call__(self, x, tokens: Tokens, state: SLSTMState | None = None):
        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        mixed, conv = self.conv(x, tokens, None if state is None else state.conv)
        mixed = jax.nn.silu(mixed)
        sees = jnp.stack([project_blocks(a, w) for a, w in (
            (mixed, self.input_gate), (mixed, self.forget_gate), (x, self.value), (x, self.output_gate))], 2)
        starts, last = document_starts(tokens.segments, past.segment)
        scan = per_shard(slstm, "BT.HK .H.. .HK BT BT .BHK", "BTHK .BHK")
        dtype = past.cells.dtype
        h, cells = scan(sees.astype(dtype), self.recurrent[...].astype(dtype), self.bias[...].astype(dtype),
                        starts, tokens.real, past.cells)
        y = self.norm(h.astype(x.dtype)).reshape(x.shape)
        return y, None if state is None else SLSTMState(conv, cells, last), Aux()


def slstm(sees: Float[Array, "B T 4 H K"], recurrent: Float[Array, "4 H K J"], bias: Float[Array, "4 H K"],
          starts: Bool[Array, "B T"], real: Bool[Array, "B T"], cells: Float[Array, "4 B H K"]):
    """The cells over a piece: h [B, T, H, K], and the cells after it. Where starts, all is forgotten first; where not
    real, nothing happens.

    Memory of the backward pass: what the gates see, and the cells once a `CHUNK` of steps.
    """
    nothing = jnp.array([0, 0, 0, LOWEST], cells.dtype)[:, None, None, None]

    def step(cells, now):
        sees, start, real = now
        before = jnp.where(start[:, None, None], nothing, cells)
        h, c, n, m = before
        i, f, z, o = jnp.moveaxis(sees + bias, 1, 0) + dot("BHK,GHKJ->GBHJ", h, recurrent)
        log_f = jax.nn.log_sigmoid(f)
        scale = jax.lax.stop_gradient(jnp.maximum(log_f + m, i))  # c / n does not depend on it
        forget, write = jnp.exp(log_f + m - scale), jnp.exp(i - scale)
        c, n = forget * c + write * jnp.tanh(z), forget * n + write
        h = jax.nn.sigmoid(o) * c / n
        return jnp.where(real[:, None, None], jnp.stack([h, c, n, scale]), before), h

    T = sees.shape[1]
    size = min(CHUNK, T)
    pad = -T % size
    cut = lambda a: jnp.pad(jnp.moveaxis(a, 1, 0), [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape(
        -1, size, a.shape[0], *a.shape[2:])
    run = jax.checkpoint(lambda cells, steps: jax.lax.scan(step, cells, steps), prevent_cse=False)
    cells, h = jax.lax.scan(run, cells, (cut(sees), cut(starts), cut(real)))
    return jnp.moveaxis(h.reshape(T + pad, *h.shape[2:])[:T], 0, 1), cells


def _bias(at: Place):
    """Zeros, but for the forget gate: from 5 down to -7 over a head's channels, by a power that grows with depth."""
    def init(key, shape, dtype):
        power = 0.3 + 1.3 * at.index / max(at.depth - 1, 1)
        falling = 5 - 12 * jnp.linspace(0, 1, shape[-1], dtype=dtype) ** power
        return jnp.zeros(shape, dtype).at[1].set(falling)

    return init
