"""Position-wise feed-forward layers: the plain MLP and the gated ones.

MLP: Vaswani et al. 2017 (arXiv:1706.03762), section 3.3. Gated: Shazeer 2020, "GLU variants" (arXiv:2002.05202).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import Config, LayerConfig, near, require
from archlab.layers.contract import Aux, Layer, Place, Tokens

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, Primer (arXiv:2109.08668)
    "silu": jax.nn.silu,
}


class ClippedSwiGLU(Config):
    """gpt-oss's activation of a gated MLP: `g sigmoid(alpha g) (u + 1)`, with the gate g at most `limit` and u within
    [-limit, limit]."""

    limit: float = 7.0
    alpha: float = 1.702

    def __post_init__(self):
        require(self.limit > 0, self, "limit", "must be positive")

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


class MLP(LayerConfig):
    """`act(x W_up) W_down`; with `gated`, `(act(x W_gate) * (x W_up)) W_down`.

    hidden: F. activation: one of gelu, gelu_tanh, relu, relu2, silu, or ClippedSwiGLU(). bias: on every product.
    """

    hidden: int
    activation: str | ClippedSwiGLU = "gelu"
    gated: bool = False
    bias: bool = False

    def __post_init__(self):
        require(self.hidden > 0, self, "hidden", "must be at least 1")
        check_activation(self)

    def build(self, rngs: nnx.Rngs, at: Place) -> "MLPModule":
        return MLPModule(self, rngs, at)


def check_activation(config) -> None:
    """Raises ValueError where `config.activation` is none, or does not fit `config.gated`."""
    if isinstance(config.activation, ClippedSwiGLU):
        require(config.gated, config, "activation", "wants gated=True")
    else:
        require(config.activation in ACTIVATIONS, config, "activation", near(str(config.activation), ACTIVATIONS))


def activate(activation: str | ClippedSwiGLU, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """The hidden channels of an MLP from what its first products give; gate: None where there is none."""
    if isinstance(activation, ClippedSwiGLU):
        return activation(gate, up)
    act = ACTIVATIONS[activation]
    return act(up) if gate is None else act(gate) * up


def SwiGLU(hidden: int, **fields) -> MLP:
    """The gated MLP with SiLU, as in Llama."""
    return MLP(hidden, activation="silu", gated=True, **fields)


def GeGLU(hidden: int, **fields) -> MLP:
    """The gated MLP with GELU (tanh form, as in T5 v1.1 and Gemma)."""
    return MLP(hidden, activation="gelu_tanh", gated=True, **fields)


class MLPModule(Layer):
    """Weights: up [D, F], gate [D, F] where gated, down [F, D]."""

    def __init__(self, config: MLP, rngs: nnx.Rngs, at: Place):
        D, F = at.width, config.hidden
        self.activation = config.activation
        self.up = parameter(rngs, "D->F", (D, F))
        self.gate = parameter(rngs, "D->F", (D, F)) if config.gated else None
        self.down = parameter(rngs, "F->D", (F, D), scale=residual_scale(at))
        self.up_bias = parameter(rngs, "->F", (F,)) if config.bias else None
        self.gate_bias = parameter(rngs, "->F", (F,)) if config.bias and config.gated else None
        self.down_bias = parameter(rngs, "->D", (D,)) if config.bias else None

    def __call__(self, x, tokens: Tokens, state=None):
        up = add_bias(project(x, self.up, "BTD,DF->BTF"), self.up_bias)
        gate = None if self.gate is None else add_bias(project(x, self.gate, "BTD,DF->BTF"), self.gate_bias)
        hidden = activate(self.activation, up, gate)
        return add_bias(project(hidden, self.down, "BTF,FD->BTD"), self.down_bias), None, Aux()


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """`x + bias` over the last axes of `x`, or `x` where there is none."""
    return x if bias is None else x + bias[...].astype(x.dtype)


def residual_scale(at: Place):
    """Shrinks what is added to the residual stream by sqrt(depth) (GPT-2): its variance is then free of the depth."""
    return at.sharers**-0.5
