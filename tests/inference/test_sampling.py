"""Sampling: what may be drawn, how often, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.inference.sampling import check_sampling, sample

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES))[None]


def drawn(n=4000, **settings):
    """The shares of tokens among n draws."""
    keys = jax.random.split(jax.random.key(0), n)
    tokens = jax.vmap(lambda key: sample(LOGITS, key, **settings)[0])(keys)
    return np.bincount(np.asarray(tokens), minlength=5) / n


@pytest.mark.parametrize("settings, share", [
    ({}, PROBABILITIES),
    ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
    ({"top_k": 2}, np.array([0, 0.4, 0, 0.3, 0]) / 0.7),
    ({"top_k": 5}, PROBABILITIES),
    ({"top_p": 1.0}, PROBABILITIES),
    ({"top_p": 0.75}, np.array([0, 0.4, 0, 0.3, 0.15]) / 0.85),  # 0.4 + 0.3 do not reach it, so one more is kept
    ({"top_k": 3, "top_p": 0.8}, np.array([0, 0.4, 0, 0.3, 0]) / 0.7),  # of the three, 0.7 / 0.85 reaches it
    ({"top_p": 1e-6}, np.array([0, 1, 0, 0, 0])),
])
def test_shares(settings, share):
    np.testing.assert_allclose(drawn(**settings), share, atol=0.03)
    assert (drawn(**settings)[share == 0] == 0).all()


def test_greedy_takes_the_first_of_the_likeliest():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [3.0, 0.0, 0.0, 3.0]])
    key = jax.random.key(0)
    for settings in ({"temperature": 0}, {"temperature": None}, {"top_k": 1}):
        np.testing.assert_array_equal(sample(logits, key, **settings), [1, 0])


def test_rows_are_drawn_apart():
    tokens = sample(jnp.zeros((64, 1000)), jax.random.key(0))
    assert len(np.unique(tokens)) > 50


@pytest.mark.parametrize("settings, message", [
    ({"temperature": -0.1}, "temperature = -0.1"), ({"temperature": float("nan")}, "temperature = nan"),
    ({"temperature": float("inf")}, "temperature = inf"), ({"top_k": 0}, "top_k = 0"), ({"top_k": 6}, "top_k = 6.*5"),
    ({"top_k": 1.5}, "top_k = 1.5"), ({"top_p": 0}, "top_p = 0"), ({"top_p": 1.01}, "top_p = 1.01"),
])
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(5, **settings)
