"""Cross-attention: a decoder's tokens look at a memory, such as what an encoder made of a source text.

Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.3.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.attention.blocks import BLOCK, attend_blocks
from archlab.attention.core import attend_plain
from archlab.attention.rules import Places, Rules, Sight
from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Memory, Place, Tokens, pytree
from archlab.layers.mlp import add_bias, residual_scale


class CrossAttention(LayerConfig):
    """Attention to the memory of the token's own document, wherever its tokens stand.

    heads: H. kv_heads: G, which divides H; None for H. head_size: K; None for D / H. bias: on queries, keys and values;
    out_bias: on the output. scale: multiplies q k^T; None for K^-0.5.
    """

    heads: int
    kv_heads: int | None = None
    head_size: int | None = None
    bias: bool = False
    out_bias: bool = False
    scale: float | None = None

    def __post_init__(self):
        require(self.heads >= 1, self, "heads", "must be at least 1")
        require(self.kv_heads is None or self.kv_heads >= 1 and self.heads % self.kv_heads == 0, self, "kv_heads",
                f"must divide heads = {self.heads}")
        require(self.head_size is None or self.head_size >= 1, self, "head_size", "must be at least 1, or None")
        require(self.scale is None or self.scale > 0, self, "scale", "must be positive, or None")

    def check(self, width: int) -> None:
        if self.head_size is None:
            require(width % self.heads == 0, self, "heads", f"must divide the width {width} (or give head_size)")

    def build(self, rngs: nnx.Rngs, at: Place) -> "CrossAttentionModule":
        return CrossAttentionModule(self, rngs, at)


@pytree
class CrossState:
    """The memory's keys and values, which no token changes; segments [B, S]: the document of each, 0 for padding."""

    keys: Float[Array, "B G S K"]
    values: Float[Array, "B G S K"]
    segments: Int[Array, "B S"]


class CrossAttentionModule(Layer):
    """Weights: query [D, H, K], key and value [D, G, K], out [H, K, D]. State: `CrossState`."""

    def __init__(self, config: CrossAttention, rngs: nnx.Rngs, at: Place):
        D, H = at.width, config.heads
        G, K = config.kv_heads or H, config.head_size or D // H
        self.scale = config.scale
        self.query = parameter(rngs, "D->HK", (D, H, K))
        self.key = parameter(rngs, "D->GK", (D, G, K))
        self.value = parameter(rngs, "D->GK", (D, G, K))
        self.out = parameter(rngs, "HK->D", (H, K, D), scale=residual_scale(at))
        self.query_bias = parameter(rngs, "->HK", (H, K)) if config.bias else None
        self.key_bias = parameter(rngs, "->GK", (G, K)) if config.bias else None
        self.value_bias = parameter(rngs, "->GK", (G, K)) if config.bias else None
        self.out_bias = parameter(rngs, "->D", (D,)) if config.out_bias else None

    def init_state(self, batch, max_length, dtype=jnp.float32, memory: Memory | None = None):
        if memory is None:
            raise ValueError("CrossAttention: init_state needs the memory that is to be read")
        state = self.read(memory)
        return CrossState(state.keys.astype(dtype), state.values.astype(dtype), state.segments)

    def read(self, memory: Memory) -> CrossState:
        """A memory's keys and values."""
        key = self._heads(memory.values, self.key, self.key_bias)
        return CrossState(key, self._heads(memory.values, self.value, self.value_bias), memory.segments)

    def __call__(self, x, tokens: Tokens, state: CrossState | None = None):
        if state is None and tokens.memory is None:
            raise ValueError("CrossAttention: a pass without a state needs `tokens.memory`")
        read = self.read(tokens.memory) if state is None else state
        q = self._heads(x, self.query, self.query_bias)
        queries = Places(tokens.segments, tokens.positions)
        keys = Places(read.segments, jnp.zeros_like(read.segments))
        rules = Rules(Sight(causal=False), self.scale)
        args = q, read.keys.astype(q.dtype), read.values.astype(q.dtype), queries, keys, rules
        y = attend_plain(*args) if q.shape[2] <= BLOCK else attend_blocks(*args, ordered=False)
        return add_bias(project(y, self.out, "BHTK,HKD->BTD"), self.out_bias), state, Aux()

    def _heads(self, x, weight, bias):
        return jnp.swapaxes(add_bias(project(x, weight, "BTD,DHK->BTHK"), bias), 1, 2)
