"""Multi-head, grouped-query and multi-query attention, causal, with an optional sliding window.

Vaswani et al. 2017 (arXiv:1706.03762), section 3.2; GQA: Ainslie et al. 2023 (arXiv:2305.13245); sliding window with
a rolling cache: Jiang et al. 2023, Mistral (arXiv:2310.06825), section 2; QK-norm: Dehghani et al. 2023
(arXiv:2302.05442), here an RMS norm per head before the rotation, as in Qwen 3.
"""

import jax.numpy as jnp
from flax import nnx

from archlab.attention.cache import KVCache
from archlab.attention.core import attend, attend_state
from archlab.attention.positions import Rotary
from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens
from archlab.layers.mlp import add_bias, residual_scale
from archlab.layers.norms import RMSNorm


class Attention(LayerConfig):
    """Causal self-attention.

    heads: H. kv_heads: G, which divides H (H: multi-head, 1: multi-query); None for H. head_size: K; None for D / H.
    window: how many places back a token sees, itself included; None for all. rotary: None for no positions (NoPE).
    qk_norm: RMS norm of each head's queries and keys. bias: on queries, keys and values.
    """

    heads: int
    kv_heads: int | None = None
    head_size: int | None = None
    window: int | None = None
    rotary: Rotary | None = Rotary()
    qk_norm: bool = False
    bias: bool = False

    def __post_init__(self):
        require(self.heads >= 1, self, "heads", "must be at least 1")
        require(self.kv_heads is None or self.kv_heads >= 1 and self.heads % self.kv_heads == 0, self, "kv_heads",
                f"must divide heads = {self.heads}")
        require(self.head_size is None or self.head_size >= 1, self, "head_size", "must be at least 1")
        require(self.window is None or self.window >= 1, self, "window", "must be at least 1, or None for no window")

    def check(self, width: int) -> None:
        if self.head_size is None:
            require(width % self.heads == 0, self, "heads", f"must divide the width {width} (or give head_size)")
        if self.rotary is not None:
            size = self.head_size or width // self.heads
            require(size % 2 == 0, self, "head_size" if self.head_size else "heads",
                    f"rotary positions turn pairs: the head size {size} must be even")

    @property
    def recurrent(self) -> bool:
        return self.window is not None

    def build(self, rngs: nnx.Rngs, at: Place) -> "AttentionModule":
        return AttentionModule(self, rngs, at)


class AttentionModule(Layer):
    """Weights: query [D, H, K], key and value [D, G, K], out [H, K, D]. State: `KVCache`."""

    def __init__(self, config: Attention, rngs: nnx.Rngs, at: Place):
        self.config = config
        D, H = at.width, config.heads
        G, K = config.kv_heads or H, config.head_size or D // H
        self.query = parameter(rngs, "D->HK", (D, H, K))
        self.key = parameter(rngs, "D->GK", (D, G, K))
        self.value = parameter(rngs, "D->GK", (D, G, K))
        self.out = parameter(rngs, "HK->D", (H, K, D), scale=residual_scale(at))
        self.query_bias = parameter(rngs, "->HK", (H, K)) if config.bias else None
        self.key_bias = parameter(rngs, "->GK", (G, K)) if config.bias else None
        self.value_bias = parameter(rngs, "->GK", (G, K)) if config.bias else None
        self.query_norm = RMSNorm().build(rngs, Place(K), "K") if config.qk_norm else None
        self.key_norm = RMSNorm().build(rngs, Place(K), "K") if config.qk_norm else None

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        slots = max_length if self.config.window is None else min(max_length, self.config.window)
        _, G, K = self.key.shape
        return KVCache.empty(batch, G, slots, K, dtype)

    def __call__(self, x, tokens: Tokens, state: KVCache | None = None):
        window = self.config.window
        q, k, v = self._heads(x, tokens)
        if state is None:
            y = attend(q, k, v, tokens.segments, tokens.positions, window)
        else:
            y, state = attend_state(q, k, v, tokens, state, window)
        return project(y, self.out, "BHTK,HKD->BTD"), state, Aux()

    def _heads(self, x, tokens: Tokens):
        """Queries [B, H, T, K], keys and values [B, G, T, K], normed and rotated."""
        heads = lambda weight, bias: jnp.swapaxes(add_bias(project(x, weight, "BTD,DHK->BTHK"), bias), 1, 2)
        q, k, v = heads(self.query, self.query_bias), heads(self.key, self.key_bias), heads(self.value, self.value_bias)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.config.rotary is not None:
            q, k = self.config.rotary.rotate(q, tokens.positions), self.config.rotary.rotate(k, tokens.positions)
        return q, k, v
