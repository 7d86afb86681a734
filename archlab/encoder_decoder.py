"""Encoder and decoder: the decoder writes a text while it looks at what the encoder made of another.

Vaswani et al. 2017 (arXiv:1706.03762); T5: Raffel et al. 2020 (arXiv:1910.10683). The decoder keeps the contract of
every language model; what the encoder made is a `Memory`, read by the decoder's `CrossAttention` layers: in a pass
without a state directly, in one with a state from keys and values that were made of it once.

    memory, aux = model.encode(source)
    out = model(ids, memory=memory)                                      # training
    state = model.init_state(batch, max_length, memory=memory)           # decoding
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Memory, Place, Training
from archlab.layers.norms import RMSNorm
from archlab.model import LanguageModel, Model


class EncoderDecoder(LanguageModel):
    """The config: that of a `LanguageModel` for the decoder, and the encoder beside it; they share the embedding.

    encoder: any layer config, as a rule one that sees both ways. encoder_norm: at its end; None for none. start: the
    token that every written text begins with.
    """

    encoder: LayerConfig = dataclasses.field(kw_only=True)
    encoder_norm: LayerConfig | None = dataclasses.field(default=RMSNorm(), kw_only=True)
    start: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        require(isinstance(self.encoder, LayerConfig), self, "encoder", "must be a layer config")
        require(0 <= self.start < self.vocab, self, "start",
                f"must be a token of the vocabulary, from 0 to {self.vocab - 1}")
        self.encoder.check(self.width)

    def build(self, rngs: nnx.Rngs) -> "EncoderDecoderModel":
        return EncoderDecoderModel(self, rngs)


class EncoderDecoderModel(Model):
    """The module of an `EncoderDecoder`."""

    def __init__(self, config: EncoderDecoder, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        at = Place(config.width, 0, config.encoder.branches)
        self.encoder = config.encoder.build(rngs, at)
        self.encoder_norm = None if config.encoder_norm is None else config.encoder_norm.build(rngs, at)

    def encode(self, source: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None = None,
               training: Training | None = None) -> tuple[Memory, Aux]:
        """What the encoder makes of a source text, and what its layers said.

        Args: source: token ids. segment_ids: 0 for padding; a decoder's token reads what bears its own number.
        """
        x, tokens, _, _ = self.enter(source, segment_ids, training=training)
        x, _, aux = self.encoder(x, tokens)
        values = x if self.encoder_norm is None else self.encoder_norm(x)
        return Memory(values, tokens.segments), aux.under("encoder")

    def begin(self, batch: int) -> Int[Array, "B 1"]:
        """The first token of each text to be written."""
        return jnp.full((batch, 1), self.config.start, jnp.int32)
