"""Who is told that only each row's last token will be looked at: the last layer of a network, and none before it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from archlab.encoder_decoder import EncoderDecoder
from archlab.layers.config import LayerConfig
from archlab.layers.contract import Aux, Layer, Place
from archlab.layers.repeat import Repeat, Shared, unstack
from archlab.layers.residual import Residual
from archlab.layers.sequence import Gated, Identity, Parallel, Provide, Sequence
from archlab.model import LanguageModel
from tests.helpers import tokens_of

D = 4


class Ear(LayerConfig):
    """Traces what it was told."""

    def build(self, rngs, at):
        return EarModule()


class EarModule(Layer):
    def __call__(self, x, tokens, state=None):
        return x, None, Aux(traces={"told": jnp.asarray(tokens.last_only)})


def told(config, last_only=True):
    """What each layer was told, by its path."""
    module = config.build(nnx.Rngs(0), Place(D, 0, 4))
    tokens = dataclasses.replace(tokens_of(jnp.ones((2, 3))), last_only=last_only)
    y, _, aux = module(jnp.ones((2, 3, D)), tokens, module.init_state(2, 3))
    return {path.removesuffix("/told"): value.tolist() for path, value in aux.traces.items()}


def test_a_sequence_tells_its_last_layer_alone():
    config = Sequence(Ear(), Sequence(Ear(), Ear()), Sequence(Ear(), Ear()))
    assert told(config) == {"layers/0": False, "layers/1/layers/0": False, "layers/1/layers/1": False,
                            "layers/2/layers/0": False, "layers/2/layers/1": True}
    assert not any(told(config, last_only=False).values())
    assert told(Sequence(Ear(), Identity())) == {"layers/0": False}


def test_a_repeat_tells_its_last_copy_where_it_is_unrolled():
    assert told(Repeat(Sequence(Ear(), Ear()), 3, scan=False)) == {
        "unit/layers/0": [False] * 3, "unit/layers/1": [False, False, True]}
    assert told(Repeat(Ear(), 3, scan=True)) == {"unit": [False] * 3}
    assert told(Sequence(Repeat(Ear(), 2, scan=False), Ear())) == {"layers/0/unit": [False] * 2, "layers/1": True}


@pytest.mark.parametrize("wrap", [Residual, Gated, Shared, lambda ear: Shared(ear, lora=2), Parallel,
                                  lambda ear: Provide("x", ear), lambda ear: Parallel(ear, ear, combine="gate")])
def test_wrappers_pass_it_on(wrap):
    for last_only in (True, False):
        heard = told(wrap(Ear()), last_only)
        assert heard and set(heard.values()) == {last_only}


def test_a_model_tells_where_a_state_is_given_and_the_last_logits_are_wanted():
    body = Sequence(Ear(), Repeat(Ear(), 2, scan=False))
    config = LanguageModel(7, D, body)
    whole = EncoderDecoder(7, D, body, encoder=body)
    ids = jnp.ones((2, 3), jnp.int32)
    for model in (config.build(nnx.Rngs(0)), unstack(config.build(nnx.Rngs(0))), whole.build(nnx.Rngs(0))):
        for logits in ("all", "last", "none"):
            for state in (None, model.init_state(2, 3)):
                traces = model(ids, state=state, logits=logits).aux.traces
                want = logits == "last" and state is not None
                assert traces["body/layers/1/unit/told"].tolist() == [False, want]
                assert not traces["body/layers/0/told"]
    memory, aux = model.encode(ids)
    assert not any(jax.tree.leaves(jax.tree.map(jnp.any, aux.traces)))
