"""A language model: token ids in, a body of layers, logits out."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.layers.alphabet import parameter
from archlab.layers.config import Config, LayerConfig, near, require
from archlab.layers.contract import Aux, Layer, Memory, Place, Tokens, Training, count_positions, pytree, wide
from archlab.layers.embedding import Embedding, Head, cross_entropy, tied_logits
from archlab.layers.mlp import add_bias
from archlab.layers.norms import RMSNorm
from archlab.layers.sharding import constrain

LOGITS = ("all", "last", "none")


class LanguageModel(Config):
    """The config of a decoder: the one place where the width is stated.

    vocab: V. width: D. body: any layer config. norm: before the head. tied: the head reuses the embedding.
    dtype: the compute dtype ("bfloat16", "float32"); None for that of the parameters. embedding_scale: multiplies the
    embedding (Gemma: sqrt(D)). logit_scale: multiplies the logits (Cohere, Granite); logit_cap: bounds them, by
    `cap tanh(logit / cap)` (Gemma 2). head_bias: one more number per token of the vocabulary (GPT-J, Phi).
    """

    vocab: int
    width: int
    body: LayerConfig
    norm: LayerConfig | None = RMSNorm()
    tied: bool = True
    dtype: str | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    head_bias: bool = False

    def __post_init__(self):
        require(self.vocab >= 1, self, "vocab", "must be at least 1")
        require(self.width >= 1, self, "width", "must be at least 1")
        dtypes = ("bfloat16", "float16", "float32", "float64")
        require(self.dtype is None or self.dtype in dtypes, self, "dtype", near(str(self.dtype), dtypes))
        require(self.logit_cap is None or self.logit_cap > 0, self, "logit_cap", "must be positive, or None")
        self.body.check(self.width)

    def build(self, rngs: nnx.Rngs) -> "Model":
        return Model(self, rngs)


@pytree
class ModelState:
    """What the model remembers: the body's state; per row the last document [B] and its length so far [B]; and how long
    the whole text is declared to be (a scalar)."""

    body: Any
    segment: Int[Array, "B"]
    length: Int[Array, "B"]
    context_length: Int[Array, ""]


class Output(NamedTuple):
    """logits [B, T, V] ([B, 1, V] for "last", None for "none"); state; aux; hidden [B, T, D], as the head gets it (of
    each row's last real token alone where `logits` is "last" and there is a state: a layer may spare the others)."""

    logits: jax.Array | None
    state: ModelState | None
    aux: Aux
    hidden: jax.Array


class Model(nnx.Module):
    """The module of a `LanguageModel`."""

    def __init__(self, config: LanguageModel, rngs: nnx.Rngs):
        self.config = config
        at = Place(config.width, 0, config.body.branches)
        self.embed = Embedding(config.vocab, config.width, rngs)
        self.body: Layer = config.body.build(rngs, at)
        self.norm = None if config.norm is None else config.norm.build(rngs, at)
        self.head = None if config.tied else Head(config.vocab, config.width, rngs)
        self.head_bias = parameter(rngs, "->V", (config.vocab,)) if config.head_bias else None

    def init_state(self, batch: int, max_length: int, dtype=None, context_length=None,
                   memory: Memory | None = None) -> ModelState:
        """The state before the first token, for rows of at most `max_length` tokens; caches in `dtype` (default: the
        compute dtype). context_length: what is declared to positions that depend on it; by default `max_length`.
        memory: what cross-attending layers read."""
        numbers = lambda: jnp.zeros((batch,), jnp.int32)
        body = self.body.init_state(batch, max_length, dtype or self.compute_dtype, memory)
        declared = jnp.asarray(max_length if context_length is None else context_length, jnp.int32)
        return ModelState(body, numbers(), numbers(), declared)

    @property
    def compute_dtype(self):
        return jnp.dtype(self.config.dtype or self.embed.table.dtype)

    def __call__(self, ids: Int[Array, "B T"], state: ModelState | None = None,
                 positions: Int[Array, "B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
                 training: bool | Training = False, rngs: nnx.Rngs | None = None, logits: str = "all",
                 memory: Memory | None = None) -> Output:
        """Runs a piece of text.

        Args:
          ids: token ids. state: from `init_state` or an earlier call; None for a pass without memory.
          positions: places within documents; by default counted, from the state on.
          segment_ids: 0 for padding, each other number a document; by default one document.
          training: True asks every layer for its training form; keys come from `rngs` (or pass a `Training`).
          logits: "all", "last" (each row's last real token only) or "none".
          memory: what cross-attending layers read in a pass without a state.
        """
        if logits not in LOGITS:
            raise ValueError(f"logits = {logits!r}: {near(str(logits), LOGITS)}")
        if training is True:
            if rngs is None:
                raise ValueError("training = True needs rngs: the training form draws random numbers")
            training = Training(rngs.dropout(), jnp.int32(0))
        x, tokens, order, (last, length) = self.enter(ids, segment_ids, positions, training or None, state)
        tokens = dataclasses.replace(tokens, memory=memory, last_only=logits == "last" and state is not None)
        x, body, aux = self.body(x, tokens, None if state is None else state.body)
        hidden = x if self.norm is None else self.norm(x)
        if order is not None:
            back = jnp.argsort(order, axis=1)
            hidden = jnp.take_along_axis(hidden, back[:, :, None], 1)
            policies = {path: policy.take(back, segment_ids > 0) for path, policy in aux.policies.items()}
            aux = dataclasses.replace(aux, policies=policies)
        if logits == "last":
            end = jnp.maximum(tokens.real.sum(1) - 1, 0)[:, None]
            end = end if order is None else jnp.take_along_axis(order, end, 1)
            out = self.logits(jnp.take_along_axis(hidden, end[:, :, None], 1))
        else:
            out = self.logits(hidden) if logits == "all" else None
        state = None if state is None else ModelState(body, last, length, state.context_length)
        return Output(out, state, aux.under("body"), hidden)

    def enter(self, ids: Int[Array, "B T"], segment_ids=None, positions=None, training: Training | None = None,
              state: ModelState | None = None):
        """What the first layer gets: the embedded stream and its `Tokens`, padding moved to the end of each row.

        Also returns where each token came from, [B, T] (None where nothing was moved), and the last document and its
        length so far, each [B].
        """
        segments = jnp.ones(ids.shape, jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
        order = None
        if segment_ids is not None and ids.shape[1] > 1:
            order = jnp.argsort(segments == 0, axis=1, stable=True)
            ids, segments = (jnp.take_along_axis(a, order, 1) for a in (ids, segments))
            positions = None if positions is None else jnp.take_along_axis(positions, order, 1)
        none = jnp.zeros(ids.shape[:1], jnp.int32)
        last, length = (none, none) if state is None else (state.segment, state.length)
        counted, last, length = count_positions(segments, last, length)
        declared = jnp.int32(ids.shape[1]) if state is None else state.context_length
        tokens = Tokens(segments, counted if positions is None else positions, training, context_length=declared)
        x = self.embed(ids, self.compute_dtype) * self.config.embedding_scale
        return constrain(x, "BT."), tokens, order, (last, length)  # on a mesh: rows split, channels whole

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head alone, in at least float32."""
        logits = tied_logits(hidden, self.embed) if self.head is None else self.head(hidden)
        logits = wide(add_bias(logits, self.head_bias)) * self.config.logit_scale
        cap = self.config.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def losses(self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """Negative log-likelihood of each target in nats, without ever holding [B, T, V]."""
        return cross_entropy(self.logits, hidden, targets, self.config.vocab)
