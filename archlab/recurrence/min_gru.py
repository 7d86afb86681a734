"""minGRU: a gated recurrent unit whose gate no longer looks at the state (Feng et al. 2024, "Were RNNs All We Needed?",
arXiv:2410.01201, section 3.1).

    z_t = sigmoid(W_z x_t)        h_t = (1 - z_t) h_{t-1} + z_t (W_h x_t)

Without the state in the gate this is a linear recurrence with a decay for each channel and token, and `diagonal` runs
it in whichever form suits the device. It is the simplest layer of this room: copy this file to try another recurrence.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, wide
from archlab.layers.mlp import residual_scale
from archlab.recurrence.diagonal import DiagonalState, diagonal
from archlab.recurrence.forms import Form


class MinGRU(LayerConfig):
    """expand: the state has F = expand * D channels. form: of the recurrence; None to choose by platform and shape."""

    expand: int = 2
    form: Form | None = None

    def __post_init__(self):
        require(self.expand >= 1, self, "expand", "must be at least 1")

    @property
    def recurrent(self) -> bool:
        return True  # a decode step's work does not grow with the context

    def build(self, rngs: nnx.Rngs, at: Place) -> "MinGRUModule":
        return MinGRUModule(self, rngs, at)


class MinGRUModule(Layer):
    """Weights: gate and candidate [D, F], out [F, D]. State: h [B, F] of each row's last document."""

    def __init__(self, config: MinGRU, rngs: nnx.Rngs, at: Place):
        D, F = at.width, config.expand * at.width
        self.gate = parameter(rngs, "D->F", (D, F))
        self.candidate = parameter(rngs, "D->F", (D, F))
        self.out = parameter(rngs, "F->D", (F, D), scale=residual_scale(at))
        self.form = config.form

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return DiagonalState.zeros(batch, self.out.shape[0], dtype)

    def __call__(self, x, tokens: Tokens, state: DiagonalState | None = None):
        z = jax.nn.sigmoid(wide(project(x, self.gate, "BTD,DF->BTF")))
        candidate = project(x, self.candidate, "BTD,DF->BTF")
        # `diagonal` forgets where documents begin, and leaves the state alone at padding.
        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        h, new = diagonal(1 - z, z * candidate, tokens, past, self.form)
        return project(h.astype(x.dtype), self.out, "BTF,FD->BTD"), None if state is None else new, Aux()
