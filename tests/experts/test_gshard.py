"""GShard's second expert: weights by algorithm 1, and how often it is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.experts.gshard import SecondByChance

P = np.array([0.5, 0.1, 0.3, 0.1])
LOGITS = jnp.log(jnp.asarray(P))


@pytest.mark.parametrize("threshold, share", [(0.5, 0.75), (0.2, 1.0), (1.0, 0.375)])
def test_the_second_is_kept_by_chance(threshold, share):
    """g2 = 0.3 / 0.8 = 0.375, kept with probability min(1, g2 / threshold); neither weight changes by it."""
    routing = SecondByChance(threshold)(jnp.broadcast_to(LOGITS, (100, 200, 4)), jax.random.key(0))
    assert (routing.experts[..., 0] == 0).all() and set(np.unique(routing.experts[..., 1])) <= {2, 4}
    kept = routing.experts[..., 1] == 2
    np.testing.assert_allclose(kept.mean(), share, atol=0.01)
    np.testing.assert_allclose(routing.weights[..., 0], 0.625, rtol=1e-6)
    np.testing.assert_allclose(routing.weights[..., 1], np.where(kept, 0.375, 0), rtol=1e-6)
    np.testing.assert_allclose(routing.probs[0, 0], P, rtol=1e-6)


def test_without_training_both_are_kept():
    routing = SecondByChance()(LOGITS[None, None])
    assert routing.experts[0, 0].tolist() == [0, 2]
    np.testing.assert_allclose(routing.weights[0, 0], [0.625, 0.375], rtol=1e-6)


def test_bad_threshold():
    with pytest.raises(ValueError, match="SecondByChance.threshold = 0.0"):
        SecondByChance(0.0)
