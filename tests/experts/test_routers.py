"""Token choice against the published conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.experts.routers import Groups, TopK, jittered
from archlab.layers.contract import Training
from tests.helpers import tokens_of

LOGITS = jnp.log(jnp.array([[[0.1, 0.4, 0.2, 0.3]]]))  # one token whose probabilities these are


@pytest.mark.parametrize("router, weights", [
    (TopK(1), [0.4]),  # Switch
    (TopK(2), [0.4, 0.3]),  # Jamba, OLMoE
    (TopK(2, renormalise=True), [4 / 7, 3 / 7]),  # Mixtral
    (TopK(3, scale=16.0), [6.4, 4.8, 3.2]),  # DeepSeek-V2
    (TopK(1, score="sigmoid"), [0.4 / 1.4]),  # Llama 4: the odds are 0.4
    (TopK(2, "sigmoid", True, 2.5), [2.5 * a / (0.4 / 1.4 + 0.3 / 1.3) for a in (0.4 / 1.4, 0.3 / 1.3)]),  # DeepSeek-V3
])
def test_conventions(router, weights):
    routing = router(LOGITS)
    assert routing.experts[0, 0].tolist() == [1, 3, 2][: router.k]
    np.testing.assert_allclose(routing.weights[0, 0], weights, rtol=1e-6)
    np.testing.assert_allclose(routing.probs.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(router.weigh(routing.gates, routing.experts), routing.weights)


def test_renormalised_is_the_softmax_over_the_chosen():
    logits = 3 * jax.random.normal(jax.random.key(0), (2, 5, 16))
    routing = TopK(4, renormalise=True)(logits)
    chosen = jnp.take_along_axis(logits, routing.experts, -1)
    np.testing.assert_allclose(routing.weights, jax.nn.softmax(chosen), rtol=1e-5)


def test_groups_by_hand():
    """Three groups of two; by the sum of the two best the middle one is out although it holds the best expert."""
    scores = jnp.array([[[0.6, 0.5, 0.9, 0.0, 0.4, 0.55]]])
    both = jnp.log(scores / (1 - scores + 1e-9) + 1e-9)
    assert TopK(3, "sigmoid", groups=Groups(3, keep=2, best=2))(both).experts[0, 0].tolist() == [0, 5, 1]
    assert TopK(3, "sigmoid", groups=Groups(3, keep=2, best=1))(both).experts[0, 0].tolist() == [2, 0, 1]


def test_groups_with_negative_scores():
    """A bias may make scores negative: experts outside the groups are still never chosen."""
    router = TopK(2, "sigmoid", groups=Groups(2, keep=1, best=2))
    routing = router(jnp.zeros((1, 1, 4)), balance=jnp.array([-5.0, -6.0, -9.0, -2.0]))
    assert sorted(routing.experts[0, 0].tolist()) in ([0, 1], [2, 3]) and routing.experts[0, 0, 0] in (0, 3)


def test_balance_changes_the_choice_and_no_weight():
    router, balance = TopK(2, "sigmoid", True), jnp.array([2.0, 0, 0, 0])
    routing, plain = router(LOGITS, balance), router(LOGITS)
    assert routing.experts[0, 0].tolist() == [0, 1]
    np.testing.assert_array_equal(routing.gates, plain.gates)
    np.testing.assert_allclose(routing.weights.sum(-1), 1, rtol=1e-6)
    grad = jax.grad(lambda b: router(LOGITS, b).weights[0, 0, 0])(balance)
    assert (grad == 0).all()


def test_float32_for_bfloat16_logits():
    routing = TopK(2)(LOGITS.astype(jnp.bfloat16))
    assert routing.weights.dtype == routing.probs.dtype == jnp.float32


def test_jitter_is_bounded_and_for_training_only():
    x, tokens = jnp.ones((2, 8, 5)), tokens_of(np.ones((2, 8)), Training(jax.random.key(0), jnp.int32(0)))
    noisy = jittered(x, tokens, 0.1)
    assert 0.05 < float(noisy.max() - noisy.min()) < 0.2 and float(abs(noisy - 1).max()) <= 0.1
    np.testing.assert_array_equal(jittered(x, tokens_of(np.ones((2, 8))), 0.1), x)


@pytest.mark.parametrize("fields, named", [
    (dict(k=0), "TopK.k = 0"),
    (dict(k=2, score="tanh"), "TopK.score = 'tanh'"),
    (dict(k=1, renormalise=True), "TopK.renormalise = True"),
    (dict(k=2, scale=0.0), "TopK.scale = 0.0"),
    (dict(k=2, jitter=1.0), "TopK.jitter = 1.0"),
    (dict(k=2, balance_rate=-1.0), "TopK.balance_rate = -1.0"),
])
def test_bad_fields(fields, named):
    with pytest.raises(ValueError, match=named):
        TopK(**fields)


@pytest.mark.parametrize("router, experts, named", [
    (TopK(5), 4, "TopK.k = 5: must be at most the number of experts, 4"),
    (TopK(2, groups=Groups(3, 1)), 8, "count = 3 must divide the number of experts, 8"),
    (TopK(2, groups=Groups(4, 1, best=3)), 8, "best = 3: a group has 2 experts"),
    (TopK(5, groups=Groups(4, 2)), 8, "k = 5 experts do not stand in keep = 2 groups of 2"),
])
def test_routers_that_do_not_fit(router, experts, named):
    with pytest.raises(ValueError, match=named):
        router.check(experts)


@pytest.mark.parametrize("fields, named", [
    (dict(count=0, keep=1), "Groups.count = 0"),
    (dict(count=4, keep=5), "Groups.keep = 5: must lie between 1 and count = 4"),
    (dict(count=4, keep=1, best=0), "Groups.best = 0"),
])
def test_bad_groups(fields, named):
    with pytest.raises(ValueError, match=named):
        Groups(**fields)
