"""Draws without replacement against their probabilities, and the control that learns nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.experts.sampled import RandomRouter, Reinforce, Sampled, draw, log_chance
from archlab.layers.contract import Place, Training
from tests.helpers import tokens_of

P = np.array([0.5, 0.3, 0.15, 0.05])
LOGITS = jnp.log(jnp.asarray(P))


def test_draws_are_those_of_an_urn():
    """Each ordered pair as often as p_i p_j / (1 - p_i), and `log_chance` says so."""
    drawn = np.asarray(draw(jnp.broadcast_to(LOGITS, (200, 300, 4)), 2, jax.random.key(0))).reshape(-1, 2)
    chance = jax.jit(log_chance)
    for i, j in itertools.permutations(range(4), 2):
        want = P[i] * P[j] / (1 - P[i])
        np.testing.assert_allclose((drawn == [i, j]).all(1).mean(), want, atol=0.006)
        said = chance(LOGITS[None, None] + 3, jnp.array([[[i, j]]]))[0, 0]
        np.testing.assert_allclose(said, np.log(want), rtol=1e-5)


def test_all_and_candidates_alone():
    """Drawing all experts is certain as a set; what is out (-inf) is never drawn, and gradients stay finite."""
    orders = jnp.array([list(itertools.permutations(range(4)))])
    orders = log_chance(jnp.broadcast_to(LOGITS, (1, 24, 4)), orders)
    np.testing.assert_allclose(np.exp(orders).sum(), 1, rtol=1e-5)
    logits = jnp.broadcast_to(LOGITS, (3, 50, 4)).at[..., 1].set(-jnp.inf)
    drawn = draw(logits, 3, jax.random.key(0))
    assert (drawn != 1).all()
    grad = jax.jit(jax.grad(lambda l: log_chance(jnp.where(jnp.isinf(logits), -jnp.inf, l), drawn).sum()))(logits)
    assert np.isfinite(grad).all()


def test_sampled_in_training_best_otherwise():
    module = Sampled(2, Reinforce(0.5, 0.9)).build(nnx.Rngs(0), Place(6), 4, 1.0)
    x = jax.random.normal(jax.random.key(1), (3, 40, 6))
    run = jax.jit(lambda training=None: module(x, tokens_of(np.ones((3, 40)), training)))
    plain, one, two = run(), *(run(Training(jax.random.key(seed), jnp.int32(0))) for seed in (1, 2))
    best = np.argsort(-np.asarray(plain.logits), -1)[..., :2]
    np.testing.assert_array_equal(plain.experts, best)
    assert (one.experts != two.experts).any() and not plain.aux.policies
    for routing in (plain, one):
        probs = np.take_along_axis(np.asarray(jax.nn.softmax(plain.logits)), np.asarray(routing.experts), -1)
        np.testing.assert_allclose(routing.weights, probs, rtol=1e-6)
    policy = one.aux.policies["draw"]
    np.testing.assert_allclose(policy.log_prob, log_chance(one.logits, one.experts))
    assert (policy.weight, policy.discount) == (0.5, np.float32(0.9)) and (policy.cost == 0).all()


def test_random_is_even_distinct_and_by_place_alone():
    router = RandomRouter(2, seed=5).build(nnx.Rngs(0), Place(6), 4, 1.0)
    assert not jax.tree.leaves(router)
    segments = np.repeat([[1, 2, 0]], [300, 200, 4], axis=1)
    routing = jax.jit(lambda x: router(x, tokens_of(segments)))(jnp.ones((1, 504, 6)))
    experts = np.asarray(routing.experts[0])
    np.testing.assert_array_equal(experts[300:500], experts[:200])  # documents alike
    assert (experts[:, 0] != experts[:, 1]).all() and (routing.weights == 0.5).all()
    np.testing.assert_allclose(np.bincount(experts[:300].reshape(-1)) / 600, 0.25, atol=0.05)
    np.testing.assert_array_equal(routing.gates, np.full((1, 504, 4), 0.25))
    other = RandomRouter(2, seed=6).build(nnx.Rngs(0), Place(6), 4, 1.0)(jnp.zeros((1, 504, 6)), tokens_of(segments))
    assert (other.experts != routing.experts).any()


@pytest.mark.parametrize("make, named", [
    (lambda: Sampled(0), "Sampled.k = 0"), (lambda: RandomRouter(0), "RandomRouter.k = 0"),
    (lambda: Sampled(5).check(4), "Sampled.k = 5: .* number of experts, 4"),
    (lambda: Reinforce(0.0), "Reinforce.weight = 0.0"), (lambda: Reinforce(discount=1.0), "Reinforce.discount = 1.0"),
])
def test_bad_fields(make, named):
    with pytest.raises(ValueError, match=named):
        make()
