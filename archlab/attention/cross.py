"""Cross-attention: a decoder's tokens look at a memory, such as what an encoder made of a source text.

Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.3.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.attention.attention import Attention, AttentionModule
from archlab.attention.blocks import BLOCK, attend_blocks
from archlab.attention.core import attend_plain
from archlab.attention.rules import Places
from archlab.layers.alphabet import project
from archlab.layers.config import LayerConfig
from archlab.layers.contract import Aux, Memory, Place, Tokens, pytree
from archlab.layers.mlp import add_bias


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
        self.projections  # raises ValueError for what is no attention

    @property
    def projections(self) -> Attention:
        """The attention whose queries, keys, values and output these are."""
        return Attention(self.heads, self.kv_heads, self.head_size, None, causal=False, bias=self.bias,
                         out_bias=self.out_bias, scale=self.scale)

    def check(self, width: int) -> None:
        self.projections.check(width)

    def build(self, rngs: nnx.Rngs, at: Place) -> "CrossAttentionModule":
        return CrossAttentionModule(self, rngs, at)


@pytree
class CrossState:
    """The memory's keys and values, which no token changes; segments [B, S]: the document of each, 0 for padding."""

    keys: Float[Array, "B G S K"]
    values: Float[Array, "B G S K"]
    segments: Int[Array, "B S"]


class CrossAttentionModule(AttentionModule):
    """The weights of `Attention`. State: `CrossState`."""

    def __init__(self, config: CrossAttention, rngs: nnx.Rngs, at: Place):
        super().__init__(config.projections, rngs, at)

    def init_state(self, batch, max_length, dtype=jnp.float32, memory: Memory | None = None):
        if memory is None:
            raise ValueError("CrossAttention: init_state needs the memory that is to be read")
        state = self.read(memory)
        return CrossState(state.keys.astype(dtype), state.values.astype(dtype), state.segments)

    def read(self, memory: Memory) -> CrossState:
        """A memory's keys and values."""
        heads = lambda *weights: jnp.swapaxes(self._project(memory.values, *weights), 1, 2)
        return CrossState(heads(self.key, self.key_bias), heads(self.value, self.value_bias), memory.segments)

    def __call__(self, x, tokens: Tokens, state: CrossState | None = None):
        if state is None and tokens.memory is None:
            raise ValueError("CrossAttention: a pass without a state needs `tokens.memory`")
        read = self.read(tokens.memory) if state is None else state
        q = jnp.swapaxes(self._project(x, self.query, self.query_bias), 1, 2)
        queries = Places(tokens.segments, tokens.positions)
        keys = Places(read.segments, jnp.zeros_like(read.segments))
        args = q, read.keys.astype(q.dtype), read.values.astype(q.dtype), queries, keys, self.rules(tokens)
        y = attend_plain(*args) if q.shape[2] <= BLOCK else attend_blocks(*args, ordered=False)
        return add_bias(project(y, self.out, "BHTK,HKD->BTD"), self.out_bias), state, Aux()
