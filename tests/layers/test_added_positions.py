"""Positions added to the stream: against loops from the papers, through a state, and beyond their length."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.layers.contract import Place
from archlab.layers.positions import LearnedPositions, SinusoidalPositions
from tests.helpers import cast, in_pieces, tokens_of

SEGMENTS = np.array([[1] * 5 + [2] * 3, [3] * 6 + [0] * 2])


def made(config, width=6):
    config.check(width)
    return cast(config.build(nnx.Rngs(0), Place(width)), jnp.float64)


@pytest.mark.parametrize("offset", [0, 2])
def test_learned(float64, offset):
    module, tokens = made(LearnedPositions(8, offset)), tokens_of(SEGMENTS)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 6)))
    table = np.asarray(module.table[...])
    assert table.shape == (8 + offset, 6) and module.table.letters == "->.D" and not module.table.decay
    y, state, _ = module(x, tokens, module.init_state(2, 8))
    assert state is None
    for b, t in np.ndindex(2, 8):
        np.testing.assert_array_equal(y[b, t], x[b, t] + table[int(tokens.positions[b, t]) + offset])
    np.testing.assert_array_equal(in_pieces(module, None, x, tokens, (3, 1, 4)), y)


@pytest.mark.parametrize("interleaved", [True, False])
def test_sinusoids_are_the_papers(float64, interleaved):
    module, tokens = made(SinusoidalPositions(50.0, 0.5, interleaved)), tokens_of(SEGMENTS)
    y, _, _ = module(jnp.zeros((2, 8, 6), jnp.float64), tokens)
    for b, t, j in np.ndindex(2, 8, 3):
        angle = int(tokens.positions[b, t]) / 50.0 ** (2 * j / 6)
        sine, cosine = (2 * j, 2 * j + 1) if interleaved else (j, j + 3)
        want = [math.sin(angle) / 2, math.cos(angle) / 2]
        np.testing.assert_allclose([y[b, t, sine], y[b, t, cosine]], want, rtol=1e-12)


def test_beyond_the_table():
    module, x = LearnedPositions(8).build(nnx.Rngs(0), Place(4)), jnp.zeros((1, 9, 4))
    with pytest.raises(ValueError, match=r"a row of 9 tokens: LearnedPositions.length = 8"):
        module(x, tokens_of(jnp.ones((1, 9))))
    with pytest.raises(ValueError, match=r"max_length of 9 tokens: LearnedPositions.length = 8"):
        module.init_state(1, 9)
    given = dataclasses.replace(tokens_of(jnp.ones((1, 2))), positions=jnp.array([[7, 8]]))
    y, _, _ = module(x[:, :2], given)
    assert bool(jnp.isfinite(y[0, 0]).all()) and bool(jnp.isnan(y[0, 1]).all())


@pytest.mark.parametrize("make, words", [
    (lambda: LearnedPositions(0), "LearnedPositions.length = 0"),
    (lambda: LearnedPositions(4, offset=-1), "LearnedPositions.offset = -1"),
    (lambda: SinusoidalPositions(base=1.0), "SinusoidalPositions.base = 1.0"),
    (lambda: SinusoidalPositions(scale=0.0), "SinusoidalPositions.scale = 0.0"),
    (lambda: SinusoidalPositions().check(5), "the width 5 must be even"),
])
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
