"""Multi-head, grouped-query and multi-query attention, causal or not, over all, a window or a chunk of the text.

Vaswani et al. 2017 (arXiv:1706.03762), section 3.2; GQA: Ainslie et al. 2023 (arXiv:2305.13245); sliding window with
a rolling cache: Jiang et al. 2023, Mistral (arXiv:2310.06825), section 2. What is done to scores is in `rules.py`.
"""

import jax.numpy as jnp
from flax import nnx

from archlab.attention.cache import KVCache, kept
from archlab.attention.core import attend, attend_kept, attend_state
from archlab.attention.positions import Positions, Rotary
from archlab.attention.qk_norm import QKNorm, QKNormModule
from archlab.attention.rules import Places, Rules, Sight
from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens
from archlab.layers.mlp import add_bias, residual_scale


class Attention(LayerConfig):
    """Self-attention.

    heads: H. kv_heads: G, which divides H (H: multi-head, 1: multi-query); None for H. head_size: K; None for D / H.
    positions: how scores know of places; None for not at all (NoPE). window: how many places away a token sees, itself
    included; chunk: it sees only its own stretch of so many places (Llama 4); None for all of the document. causal:
    nothing later than itself; False for encoders, which keep no state. qk_norm: norms queries and keys. bias: on
    queries, keys and values; out_bias: on the output. scale: multiplies q k^T; None for K^-0.5. cap: of the scores,
    `cap tanh(score / cap)` (Gemma 2). clip: bounds queries, keys and values to [-clip, clip] (MPT, OLMo), after norms
    and before the rotation (OLMoE). sinks: a learned score per head that takes its share of the softmax and gives
    nothing (gpt-oss).
    """

    heads: int
    kv_heads: int | None = None
    head_size: int | None = None
    positions: Positions | None = Rotary()
    window: int | None = None
    chunk: int | None = None
    causal: bool = True
    qk_norm: QKNorm | None = None
    bias: bool = False
    out_bias: bool = False
    scale: float | None = None
    cap: float | None = None
    clip: float | None = None
    sinks: bool = False

    def __post_init__(self):
        require(self.heads >= 1, self, "heads", "must be at least 1")
        require(self.kv_heads is None or self.kv_heads >= 1 and self.heads % self.kv_heads == 0, self, "kv_heads",
                f"must divide heads = {self.heads}")
        require(self.positions is None or isinstance(self.positions, Positions), self, "positions",
                "must be a way to mark places, such as Rotary(), or None")
        require(self.qk_norm is None or isinstance(self.qk_norm, QKNorm), self, "qk_norm", "must be QKNorm(), or None")
        for field in ("head_size", "window", "chunk"):
            value = getattr(self, field)
            require(value is None or value >= 1, self, field, "must be at least 1, or None")
        for field in ("scale", "cap", "clip"):
            value = getattr(self, field)
            require(value is None or value > 0, self, field, "must be positive, or None")

    def check(self, width: int) -> None:
        if self.head_size is None:
            require(width % self.heads == 0, self, "heads", f"must divide the width {width} (or give head_size)")
        if self.positions is not None:
            self.positions.check(self.head_size or width // self.heads)

    @property
    def sight(self) -> Sight:
        return Sight(self.window, self.chunk, self.causal)

    @property
    def recurrent(self) -> bool:
        return self.causal and self.sight.reach is not None

    def build(self, rngs: nnx.Rngs, at: Place) -> "AttentionModule":
        return AttentionModule(self, rngs, at)


class AttentionModule(Layer):
    """Weights: query [D, H, K], key and value [D, G, K], out [H, K, D]; sinks [H]. State: `KVCache`."""

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
        self.out_bias = parameter(rngs, "->D", (D,)) if config.out_bias else None
        self.query_norm = QKNormModule(config.qk_norm, rngs, H, K, "H") if config.qk_norm else None
        self.key_norm = QKNormModule(config.qk_norm, rngs, G, K, "G") if config.qk_norm else None
        self.sinks = parameter(rngs, "->H", (H,)) if config.sinks else None

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        if not self.config.causal:
            return None
        reach = self.config.sight.reach
        slots = max_length if reach is None else min(max_length, reach)
        _, G, K = self.key.shape
        return KVCache.empty(batch, G, slots, K, dtype)

    def __call__(self, x, tokens: Tokens, state: KVCache | None = None):
        q, k, v = self.heads(x, tokens)
        rules = self.rules(tokens)
        if tokens.keys == "read":  # k and v are dead code
            y = attend_kept(q, tokens, kept(self, state), rules)
        elif state is None:
            y = attend(q, k, v, Places(tokens.segments, tokens.positions), rules)
            state = KVCache.of(k, v, tokens, rules.sight.reach) if tokens.keys == "keep" else None
        else:
            y, state = attend_state(q, k, v, tokens, state, rules)
        return add_bias(project(y, self.out, "BHTK,HKD->BTD"), self.out_bias), state, Aux()

    def heads(self, x, tokens: Tokens):
        """Queries [B, H, T, K], keys and values [B, G, T, K], normed and rotated."""
        norm, positions = self.config.qk_norm, self.config.positions
        q = self._project(x, self.query, self.query_bias)
        k = self._project(x, self.key, self.key_bias)
        v = self._project(x, self.value, self.value_bias)
        heads_first = lambda *arrays: (jnp.swapaxes(a, 1, 2) for a in arrays)
        if norm is not None and not norm.after:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = heads_first(*(self._clipped(a) for a in (q, k, v)))
        if positions is not None:
            q, k = positions.turn(q, k, tokens)
        if norm is not None and norm.after:
            q, k = heads_first(*(n(a) for n, a in zip((self.query_norm, self.key_norm), heads_first(q, k))))
        return q, k, v

    def rules(self, tokens: Tokens) -> Rules:
        """What becomes of the scores."""
        config = self.config
        bias = None if config.positions is None else config.positions.bias(config.heads, tokens)
        sinks = None if self.sinks is None else self.sinks[...]
        return Rules(config.sight, config.scale, config.cap, bias, sinks)

    def _project(self, x, weight, bias):
        return add_bias(project(x, weight, "BTD,DHK->BTHK"), bias)

    def _clipped(self, a):
        return a if self.config.clip is None else jnp.clip(a, -self.config.clip, self.config.clip)
