"""What a model is asked to predict, by what it is.

A causal language model predicts each next token. One that sees both ways would only have to look: it is asked for
tokens that were hidden from it (Devlin et al. 2018, BERT, arXiv:1810.04805, section 3.1). An encoder-decoder reads the
first half of each row and writes the second (the prefix objective of Raffel et al. 2020, arXiv:1910.10683, section
3.2.3). Losses of different objectives are not comparable.
"""

import dataclasses

import jax
import jax.numpy as jnp

from archlab.data.batches import Batch
from archlab.encoder_decoder import EncoderDecoder
from archlab.layers.contract import Aux, Training
from archlab.model import LanguageModel, Model, Output

HIDDEN, MASKED, CHANGED = 0.15, 0.8, 0.1  # shares: of tokens asked for; of those, shown as the mask, or as another


def objective(config: LanguageModel) -> str:
    """Its name: "next token", "masked tokens" or "second half"."""
    if isinstance(config, EncoderDecoder):
        return "second half"
    return "next token" if config.body.causal else "masked tokens"


def prepare(config: LanguageModel, batch: Batch, key: jax.Array) -> Batch:
    """The batch as the model's objective wants it; `key` draws what is hidden.

    The mask is the vocabulary's last token, which no text in bytes (UTF-8) contains.
    """
    kind = objective(config)
    if kind == "masked tokens":
        keys = jax.random.split(key, 3)
        hidden = (jax.random.uniform(keys[0], batch.ids.shape) < HIDDEN) & (batch.segments > 0)
        fate = jax.random.uniform(keys[1], batch.ids.shape)
        other = jax.random.randint(keys[2], batch.ids.shape, 0, config.vocab)
        shown = jnp.where(fate < MASKED, config.vocab - 1, jnp.where(fate < MASKED + CHANGED, other, batch.ids))
        return dataclasses.replace(batch, ids=jnp.where(hidden, shown, batch.ids), targets=batch.ids,
                                   weights=hidden.astype(batch.weights.dtype))
    if kind == "second half":
        half = batch.ids.shape[1] // 2
        later = jax.tree.map(lambda a: a[:, half:], batch)
        return dataclasses.replace(later, source=batch.ids[:, :half], source_segments=batch.segments[:, :half])
    return batch


def run(model: Model, batch: Batch, training: Training | None = None) -> Output:
    """The model's pass over a prepared batch, without logits; `aux` holds what all of its layers said."""
    memory, said = None, Aux()
    if batch.source is not None:
        memory, said = model.encode(batch.source, batch.source_segments, training)
        if said.policies:
            raise ValueError(f"REINFORCE judges a decision by its own token's loss, and an encoder's tokens have none: "
                             f"{sorted(said.policies)}")
    out = model(batch.ids, segment_ids=batch.segments, training=training or False, logits="none", memory=memory)
    return out._replace(aux=said | out.aux)
