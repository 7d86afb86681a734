"""DeltaNet: linear attention that replaces what a key recalls, where plain linear attention adds to it.

    S_t = S_{t-1} + beta_t k_t (v_t - k_t S_{t-1})^T        y_t = q_t S_t

Schlag et al. 2021 (arXiv:2102.11174); as here, with short convolutions, SiLU and keys of length 1: Yang et al. 2024
(arXiv:2406.06484), section 3.4 and the published code.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, pytree, wide
from archlab.layers.mlp import residual_scale
from archlab.layers.norms import L2Norm, NormModule, RMSNorm
from archlab.recurrence.convolution import CausalConv, ConvState
from archlab.recurrence.delta_rule import delta_rule
from archlab.recurrence.forms import Form
from archlab.recurrence.memory import MemoryState

UNIT = L2Norm(gain=False)


class DeltaNet(LayerConfig):
    """The delta rule behind short convolutions.

    heads: G, of queries and keys. value_heads: H, a multiple of G; None for G. key_size: N. value_size: P. conv: the
    width of the convolutions. negative: beta in (0, 2) instead of (0, 1), so that a step may turn what it finds along
    the key to its opposite: eigenvalues down to -1, which following a state wants (Grazzi et al. 2024,
    arXiv:2411.12537). form: of the recurrence; None to choose.
    """

    heads: int
    value_heads: int | None = None
    key_size: int = 128
    value_size: int = 128
    conv: int = 4
    negative: bool = False
    form: Form | None = None

    def __post_init__(self):
        for field in ("heads", "key_size", "value_size", "conv"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")
        H = self.value_heads
        require(H is None or H >= 1 and H % self.heads == 0, self, "value_heads",
                f"must be a multiple of heads = {self.heads}, or None for as many")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "DeltaNetModule":
        return DeltaNetModule(self, rngs, at)


@pytree
class DeltaNetState:
    """convs: the last inputs of the convolutions of q, k and v; memory: S [B, H, N, P] and the last document met."""

    convs: tuple[ConvState, ConvState, ConvState]
    memory: MemoryState


class DeltaNetModule(Layer):
    """Weights: query and key [D, G, N], value [D, H, P]; convs; write [D, H], to beta; norm [P], shared by all heads;
    out [H, P, D]. Trace: write [B, T], the mean beta over heads."""

    def __init__(self, config: DeltaNet, rngs: nnx.Rngs, at: Place):
        D, G, N, P, self.config = at.width, config.heads, config.key_size, config.value_size, config
        H = config.value_heads or G
        self.query, self.key = (parameter(rngs, "D->GK", (D, G, N)) for _ in range(2))
        self.value = parameter(rngs, "D->HK", (D, H, P))
        self.convs = nnx.List([CausalConv(config.conv, F, rngs, bias=False) for F in (G * N, G * N, H * P)])
        self.write = parameter(rngs, "D->H", (D, H))
        self.norm = NormModule(RMSNorm(), rngs, (P,), "->K")
        self.out = parameter(rngs, "HK->D", (H, P, D), scale=residual_scale(at))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        N, (_, H, P) = self.key.shape[2], self.value.shape
        convs = tuple(conv.init_state(batch, dtype) for conv in self.convs)
        return DeltaNetState(convs, MemoryState.zeros(batch, H, N, P, dtype))

    def __call__(self, x, tokens: Tokens, state: DeltaNetState | None = None):
        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        heads, convs = [], []
        for weight, conv, before in zip((self.query, self.key, self.value), self.convs, past.convs):
            u, new = conv(project(x, weight, "BTD,DHK->BTHK").reshape(*x.shape[:2], -1), tokens, state and before)
            heads.append(jnp.moveaxis(jax.nn.silu(u).reshape(*u.shape[:2], *weight.shape[1:]), 1, 2))
            convs.append(new)
        q, k, v = heads
        q, k = UNIT.normalise(wide(q)) * q.shape[-1] ** -0.5, UNIT.normalise(wide(k))

        beta = jax.nn.sigmoid(one_per_head(x, self.write)) * (2 if self.config.negative else 1)
        y, memory = delta_rule(q, k, v, beta, self.log_decay(x), tokens, past.memory, self.config.form)
        y = project(self.finish(y.astype(x.dtype), x), self.out, "BHTP,HPD->BTD")
        aux = Aux(traces={"write": jnp.where(tokens.real, beta.mean(1), 0)})
        return y, None if state is None else DeltaNetState(tuple(convs), memory), aux

    def log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B H T"]:
        """g of the delta rule: here nothing is forgotten but what is replaced."""
        return jnp.zeros((x.shape[0], self.value.shape[1], x.shape[1]), wide(x).dtype)

    def finish(self, y: Float[Array, "B H T P"], x: Float[Array, "B T D"]) -> Float[Array, "B H T P"]:
        """What is done to each head before the output."""
        return self.norm(y)


def one_per_head(x: Float[Array, "B T D"], weight: nnx.Param) -> Float[Array, "B H T"]:
    """One number for each head and token, wide: rates, decays. weight [D, H]."""
    return jnp.swapaxes(wide(project(x, weight, "BTD,DH->BTH")), 1, 2)
