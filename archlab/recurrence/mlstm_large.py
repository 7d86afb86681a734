"""The mLSTM layer of xLSTM 7B (Beck et al. 2025, arXiv:2503.13427, section 3.1), made for speed: the stream's own
width, no convolution, narrow queries and keys, capped gates. An MLP of its own follows it, as in a transformer."""

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, wide
from archlab.layers.mlp import add_bias
from archlab.layers.norms import LayerNorm, Norm, NormModule
from archlab.recurrence.forms import Form
from archlab.recurrence.mlstm import EPS, CellState, forget_bias, mlstm, wang


class MLSTMLarge(LayerConfig):
    """`W_out (sigmoid(W_o x) * norm(mLSTM(q, k, v, i, f)))`.

    heads: H. keys, values: how many channels all heads' keys (and queries) and all heads' values have, as shares of D.
    gate_cap: what the gates see is bounded, `cap tanh(x / cap)`. norm: of each head's output. eps: of the cell.
    form: of the recurrence; None to choose.
    """

    heads: int
    keys: float = 0.5
    values: float = 1.0
    gate_cap: float = 15.0
    norm: Norm = LayerNorm(1e-6, bias=False)
    eps: float = EPS
    form: Form | None = None

    def __post_init__(self):
        require(self.heads >= 1, self, "heads", "must be at least 1")
        for field in ("keys", "values", "gate_cap", "eps"):
            require(getattr(self, field) > 0, self, field, "must be above 0")

    def sizes(self, width: int) -> tuple[int, int]:
        """N and P: the channels of a head's keys and of its values."""
        return int(self.keys * width) // self.heads, int(self.values * width) // self.heads

    def check(self, width: int) -> None:
        for field in ("keys", "values"):
            channels = int(getattr(self, field) * width)
            require(channels >= 1 and channels % self.heads == 0, self, field,
                    f"gives {channels} channels, which must divide into {self.heads} heads")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "MLSTMLargeModule":
        return MLSTMLargeModule(self, rngs, at)


class MLSTMLargeModule(Layer):
    """Weights: query and key [D, H, N], value and gate [D, H, P], input_gate and forget_gate [D, H] and their biases
    [H], norm [H, P], out [H, P, D]. Trace: forget [B, T], the mean of sigmoid(f) over heads."""

    def __init__(self, config: MLSTMLarge, rngs: nnx.Rngs, at: Place):
        D, H, (N, P) = at.width, config.heads, config.sizes(at.width)
        small, zeros = nnx.initializers.normal((2 / (5 * D)) ** 0.5), nnx.initializers.zeros
        self.query, self.key = (parameter(rngs, "D->HK", (D, H, N), small) for _ in range(2))
        self.value, self.gate = (parameter(rngs, "D->HK", (D, H, P), small) for _ in range(2))
        self.input_gate, self.forget_gate = (parameter(rngs, "D->H", (D, H), zeros) for _ in range(2))
        self.input_bias = parameter(rngs, "->H", (H,), nnx.initializers.constant(-10.0))
        self.forget_bias = parameter(rngs, "->H", (H,), forget_bias)
        self.norm = NormModule(config.norm, rngs, (H, P), "->HK")
        self.out = parameter(rngs, "HK->D", (H, P, D), wang(at, branches=2))
        self.config = config

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        _, H, N = self.key.shape
        return CellState.zeros(batch, H, N, self.value.shape[2], dtype)

    def __call__(self, x, tokens: Tokens, state: CellState | None = None):
        config = self.config
        q, k, v = (project(x, w, "BTD,DHK->BHTK") for w in (self.query, self.key, self.value))
        i, f = (self._gate(x, w, b) for w, b in (
            (self.input_gate, self.input_bias), (self.forget_gate, self.forget_bias)))
        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        h, new = mlstm(q, k, v, i, f, tokens, past, config.eps, config.form)
        h = self.norm(jnp.moveaxis(h, 1, 2)).astype(x.dtype) * jax.nn.sigmoid(project(x, self.gate, "BTD,DHK->BTHK"))
        aux = Aux(traces={"forget": jnp.where(tokens.real, jax.nn.sigmoid(f).mean(1), 0)})
        return project(h, self.out, "BTHK,HKD->BTD"), None if state is None else new, aux

    def _gate(self, x, weight, bias):
        """What a gate sees [B, H, T], capped, at least float32."""
        sees = jnp.swapaxes(add_bias(wide(project(x, weight, "BTD,DH->BTH")), bias), 1, 2)
        return self.config.gate_cap * jnp.tanh(sees / self.config.gate_cap)
