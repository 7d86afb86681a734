"""Multi-head latent attention: keys and values of all heads are made from one short vector, which alone is remembered.

DeepSeek-V2 (arXiv:2405.04434), section 2.1; V3 (arXiv:2412.19437), section 2.1.1. A token remembers its latent, normed,
and one rotated key that all heads share. Over a cache heads are never made: what would expand a latent is taken to the
query and to the output instead, so that attention is multi-query over the cache itself.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from archlab.attention.blocks import BLOCK, attend_blocks
from archlab.attention.cache import KVCache, kept
from archlab.attention.core import attend, attend_plain
from archlab.attention.positions import Rotary
from archlab.attention.rules import Places, Rules
from archlab.attention.scaling import YaRN
from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens
from archlab.layers.mlp import add_bias, residual_scale
from archlab.layers.norms import Norm, RMSNorm


class LatentAttention(LayerConfig):
    """Causal self-attention through a latent of `rank` channels (MLA).

    heads: H. rank: of the latent from which keys and values are made; query_rank: of that of queries, None for queries
    straight from the stream. content_size: channels of a head's queries and keys that know no places; rotary_size:
    those that turn, whose keys all heads share; value_size: channels of a head's values. positions: Rotary(), or None
    for none (the shared key is there all the same). norm: of both latents. bias: on what makes the latents and the
    shared key, and on the output. scale: multiplies q k^T; None for (content_size + rotary_size)^-0.5, times YaRN's
    `score_factor`.
    """

    heads: int
    rank: int = 512
    query_rank: int | None = None
    content_size: int = 128
    rotary_size: int = 64
    value_size: int = 128
    positions: Rotary | None = Rotary(interleaved=True)
    norm: Norm = RMSNorm()
    bias: bool = False
    scale: float | None = None

    def __post_init__(self):
        for field in ("heads", "rank", "content_size", "value_size"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")
        require(self.query_rank is None or self.query_rank >= 1, self, "query_rank", "must be at least 1, or None")
        require(self.rotary_size >= 2 and self.rotary_size % 2 == 0, self, "rotary_size",
                "channels are turned in pairs: must be even, at least 2")
        require(self.positions is None or isinstance(self.positions, Rotary), self, "positions",
                "must be Rotary(), or None")
        require(isinstance(self.norm, Norm), self, "norm", "must be a norm such as RMSNorm()")
        require(self.scale is None or self.scale > 0, self, "scale", "must be positive, or None")
        if self.positions is not None:
            self.positions.check(self.rotary_size)

    @property
    def rules(self) -> Rules:
        """What becomes of the scores."""
        scale, scaling = self.scale, self.positions and self.positions.scaling
        if scale is None:
            scale = (self.content_size + self.rotary_size) ** -0.5
            scale *= scaling.score_factor if isinstance(scaling, YaRN) else 1
        return Rules(scale=scale)

    @property
    def recurrent(self) -> bool:
        return False

    def build(self, rngs: nnx.Rngs, at: Place) -> "LatentAttentionModule":
        return LatentAttentionModule(self, rngs, at)


class LatentAttentionModule(Layer):
    """Weights, with N for the rank, R for that of queries, and P, Q, C for the sizes of content, rotary part and value:
    latent [D, N], latent_norm, shared_key [D, Q], key_up [N, H, P], value_up [N, H, C], out [H, C, D]; query
    [D, H, P + Q], or query_down [D, R], query_norm and query_up [R, H, P + Q].

    State: `KVCache` of one head, N + Q numbers a token: the latent and the shared key, one after the other.
    """

    def __init__(self, config: LatentAttention, rngs: nnx.Rngs, at: Place):
        self.config = config
        D, H, N, R, P, Q, C = (at.width, config.heads, config.rank, config.query_rank, config.content_size,
                               config.rotary_size, config.value_size)
        norm = lambda rank: config.norm.build(rngs, at._replace(width=rank), ".")
        bias = lambda size: parameter(rngs, "->.", (size,)) if config.bias else None
        if R is None:
            self.query = parameter(rngs, "D->HK", (D, H, P + Q))
        else:
            self.query_down, self.query_down_bias = parameter(rngs, "D->.", (D, R)), bias(R)
            self.query_norm = norm(R)
            self.query_up = parameter(rngs, ".->HK", (R, H, P + Q))
        self.latent, self.latent_bias = parameter(rngs, "D->.", (D, N)), bias(N)
        self.latent_norm = norm(N)
        self.shared_key, self.shared_key_bias = parameter(rngs, "D->K", (D, Q)), bias(Q)
        self.key_up = parameter(rngs, ".->HK", (N, H, P))
        self.value_up = parameter(rngs, ".->HK", (N, H, C))
        self.out = parameter(rngs, "HK->D", (H, C, D), scale=residual_scale(at))
        self.out_bias = parameter(rngs, "->D", (D,)) if config.bias else None

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return KVCache.empty(batch, 1, max_length, self.config.rank + self.config.rotary_size, dtype, values=False)

    def __call__(self, x, tokens: Tokens, state: KVCache | None = None):
        q, latents = self.queries_and_latents(x, tokens)
        places = Places(tokens.segments, tokens.positions)
        if tokens.keys == "read":  # these tokens' own latents are dead code
            y = self.reread(q, places, kept(self, state))
        elif state is None:
            y = self.expanded(attend, q, latents, places)
            state = KVCache.of(latents, None, tokens) if tokens.keys == "keep" else None
        else:
            y, state = self.continued(q, latents, tokens, places, state)
        return add_bias(project(y, self.out, "BHTK,HKD->BTD"), self.out_bias), state, Aux()

    def queries_and_latents(self, x, tokens: Tokens) -> tuple[Float[Array, "B H T P+Q"], Float[Array, "B 1 T N+Q"]]:
        """Queries, and what a token remembers; what turns has been turned."""
        config, narrow = self.config, "BTD,DN->BTN"
        if config.query_rank is None:
            q = project(x, self.query, "BTD,DHK->BHTK")
        else:
            q = self.query_norm(add_bias(project(x, self.query_down, narrow), self.query_down_bias))
            q = project(q, self.query_up, "BTN,NHK->BHTK")
        latent = self.latent_norm(add_bias(project(x, self.latent, narrow), self.latent_bias))
        key = add_bias(project(x, self.shared_key, narrow), self.shared_key_bias)[:, None]
        content, turned = jnp.split(q, [config.content_size], -1)
        if config.positions is not None:
            turned, key = config.positions.turn(turned, key, tokens)
        return jnp.concatenate([content, turned], -1), jnp.concatenate([latent[:, None], key], -1)

    def expanded(self, attend, q, latents, *places: Places) -> Float[Array, "B H T C"]:
        """By `attend` over keys and values made for every head, which is the cheaper where each token is met by many
        queries."""
        latent, key = jnp.split(latents, [self.config.rank], -1)
        heads = lambda weight: project(latent[:, 0], weight, "BTN,NHK->BHTK")
        content = heads(self.key_up)
        k = jnp.concatenate([content, jnp.broadcast_to(key, (*content.shape[:3], key.shape[-1]))], -1)
        return attend(q, k, heads(self.value_up), *places, self.config.rules)

    def absorbed(self, attend, q, latents: Float[Array, "B 1 S N+Q"], places: Places, slots: Places, **options):
        """The same by `attend` over latents as they are: q (c W) = (q W^T) c, and (weights c) W for values. They serve
        as keys and as values; of the values' channels the last, the shared key's, are dropped."""
        content, turned = jnp.split(q, [self.config.content_size], -1)
        q = jnp.concatenate([project(content, self.key_up, "BHTK,NHK->BHTN"), turned], -1)
        y = attend(q, latents, latents, places, slots, self.config.rules, **options)
        return project(y[..., : self.config.rank], self.value_up, "BHTN,NHK->BHTK")

    def reread(self, q, places: Places, state: KVCache) -> Float[Array, "B H T C"]:
        """Attention to what the cache holds, and to that alone."""
        args = q, state.keys.astype(q.dtype), places, Places(state.segments, state.positions)
        if q.shape[2] <= BLOCK:
            return self.absorbed(attend_plain, *args)
        return self.expanded(functools.partial(attend_blocks, ordered=False), *args)

    def continued(self, q, latents, tokens: Tokens, places: Places, state: KVCache):
        """Attention of a piece to what the cache holds and to itself, and the cache with the piece written."""
        length, slots = q.shape[2], state.keys.shape[2]
        if length > slots:
            raise ValueError(f"a piece of {length} tokens does not fit a state of max_length {slots}")
        new = state.append(latents, None, tokens)
        cached = new.keys.astype(q.dtype), places, Places(new.segments, new.positions)
        if length <= BLOCK:
            return self.absorbed(attend_plain, q, *cached), new
        y = jax.lax.cond((state.cursor == 0).all(),  # most long pieces begin a text
                         lambda: self.expanded(attend, q, latents.astype(new.keys.dtype).astype(q.dtype), places),
                         lambda: self.absorbed(attend_blocks, q, *cached, ordered=False))
        return y, new
