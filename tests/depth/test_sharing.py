"""Sharing patterns: which weights each effective layer uses, against the formulas of the paper's table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.depth.recur import Recur
from archlab.depth.sharing import cycle, middle_cycle, middle_sequence, sequence
from archlab.layers.alphabet import parameter, parameters_of
from archlab.layers.config import LayerConfig
from archlab.layers.contract import Aux, Layer, Place
from archlab.layers.repeat import Repeat
from tests.helpers import tokens_of


class Signature(LayerConfig):
    """Pushes its one weight, a random number, into the stream, which moves on by a channel: so many layers, so many
    channels, and the stream says which weights each layer had."""

    @property
    def branches(self):
        return 1

    def build(self, rngs, at):
        return SignatureModule(rngs)


class SignatureModule(Layer):
    def __init__(self, rngs):
        self.name = parameter(rngs, "->.", (1,), jax.random.normal)

    def __call__(self, x, tokens, state=None):
        name = jnp.broadcast_to(self.name[...], (*x.shape[:2], 1)).astype(x.dtype)
        return jnp.concatenate([x[:, :, 1:], name], axis=-1), None, Aux()


def weights_used(config) -> list[int]:
    """For each effective layer the number of its set of weights, numbered by first use."""
    layers = config.branches
    module = config.build(nnx.Rngs(0), Place(layers, 0, layers))
    said = np.asarray(module(jnp.zeros((1, 1, layers)), tokens_of(np.ones((1, 1))))[0])[0, 0]
    assert 0 not in said
    met = list(dict.fromkeys(said))
    assert len(met) == sum(p.size for p in parameters_of(module).values())  # every weight is used
    return [met.index(name) for name in said]


@pytest.mark.parametrize("layers, recursions", [(9, 3), (8, 2), (6, 1), (4, 4)])
def test_cycle_and_sequence(layers, recursions):
    unique = layers // recursions
    assert weights_used(cycle(Signature(), layers, recursions)) == [layer % unique for layer in range(layers)]
    assert weights_used(sequence(Signature(), layers, recursions)) == [layer // recursions for layer in range(layers)]


@pytest.mark.parametrize("layers, recursions", [(8, 3), (8, 2), (5, 3)])
def test_middle_patterns_keep_both_ends(layers, recursions):
    unique = (layers - 2) // recursions
    middle = range(1, layers - 1)
    inner = [(layer - 1) % unique + 1 for layer in middle]
    assert weights_used(middle_cycle(Signature(), layers, recursions)) == [0, *inner, unique + 1]
    inner = [(layer - 1) // recursions + 1 for layer in middle]
    assert weights_used(middle_sequence(Signature(), layers, recursions)) == [0, *inner, unique + 1]


def test_expressions():
    assert cycle(Signature(), 6, 3) == Recur(Repeat(Signature(), 2), 3)
    assert sequence(Signature(), 3, 3) == Recur(Signature(), 3)


@pytest.mark.parametrize("make, words", [
    (lambda: cycle(Signature(), 8, 3), "cycle: 8 layers in 3 recursions"),
    (lambda: sequence(Signature(), 4, 0), "sequence: 4 layers in 0 recursions"),
    (lambda: middle_cycle(Signature(), 9, 3), "middle_cycle: 9 layers, of which 7 share weights, in 3 recursions"),
    (lambda: middle_sequence(Signature(), 2, 1), "middle_sequence: 2 layers, of which 0 share weights"),
])
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
