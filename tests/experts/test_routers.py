"""Routers against the published conventions, and the losses against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.experts.routers import Routing, TopK, balance_loss, routing_traces, z_loss

LOGITS = jnp.log(jnp.array([[[0.1, 0.4, 0.2, 0.3]]]))  # one token whose probabilities these are


@pytest.mark.parametrize("router, weights", [
    (TopK(1), [0.4]),  # Switch
    (TopK(2), [0.4, 0.3]),  # Jamba
    (TopK(2, renormalise=True), [4 / 7, 3 / 7]),  # GShard
    (TopK(2, softmax="after"), [4 / 7, 3 / 7]),  # Mixtral: the same
    (TopK(3), [0.4, 0.3, 0.2]),
])
def test_conventions(router, weights):
    routing = router(LOGITS)
    assert routing.experts[0, 0].tolist() == [1, 3, 2][: router.k]
    np.testing.assert_allclose(routing.weights[0, 0], weights, rtol=1e-6)
    np.testing.assert_allclose(routing.probs, jnp.exp(LOGITS), rtol=1e-6)


def test_float32_for_bfloat16_logits():
    routing = TopK(2)(LOGITS.astype(jnp.bfloat16))
    assert routing.weights.dtype == routing.probs.dtype == jnp.float32


def even(E, k):
    """A batch [2, E] in which each expert is chosen equally often, with equal probabilities."""
    experts = (jnp.arange(E)[:, None] + jnp.arange(k)) % E
    experts = jnp.broadcast_to(experts, (2, E, k))
    return Routing(experts, jnp.full((2, E, k), 1 / k), jnp.full((2, E, E), 1 / E)), jnp.ones((2, E), bool)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_even_routing_costs_one(k):
    routing, real = even(4, k)
    traces = routing_traces(routing, real)
    np.testing.assert_allclose(balance_loss(routing, real), 1, rtol=1e-6)
    np.testing.assert_allclose(traces["load"], np.full(4, 0.25), rtol=1e-6)
    np.testing.assert_allclose(traces["max_violation"], 0, atol=1e-6)
    np.testing.assert_allclose([traces["entropy"], traces["mean_entropy"]], np.log(4), rtol=1e-6)


def test_collapsed_routing_costs_the_number_of_experts():
    logits = jnp.full((2, 5, 4), -100.0).at[..., 2].set(100.0)
    routing, real = TopK(1)(logits), jnp.ones((2, 5), bool)
    traces = routing_traces(routing, real)
    np.testing.assert_allclose(balance_loss(routing, real), 4, rtol=1e-6)
    assert traces["load"].tolist() == [0, 0, 1, 0] and traces["max_violation"] == 3
    np.testing.assert_allclose([traces["entropy"], traces["mean_entropy"]], 0, atol=1e-6)


def test_decided_tokens_in_a_balanced_batch():
    """Each token certain of an expert of its own: no entropy in a token, all of it in their mean."""
    logits = 100 * jnp.eye(4)[None]
    traces = routing_traces(TopK(1)(logits), jnp.ones((1, 4), bool))
    np.testing.assert_allclose([traces["entropy"], traces["mean_entropy"]], [0, np.log(4)], atol=1e-6)


def test_z_loss_closed_form():
    real = jnp.array([[True, True, False]])
    logits = jnp.stack([jnp.zeros(4), jnp.full(4, 3.0), jnp.full(4, 50.0)])[None]
    np.testing.assert_allclose(z_loss(logits, real), (np.log(4) ** 2 + (3 + np.log(4)) ** 2) / 2, rtol=1e-6)


def test_padding_counts_nowhere():
    logits = jax.random.normal(jax.random.key(0), (2, 6, 4))
    real = jnp.array([[True] * 4 + [False] * 2] * 2)
    few, all_real = logits[:, :4], jnp.ones((2, 4), bool)
    padded, alone = TopK(2)(logits), TopK(2)(few)
    np.testing.assert_allclose(balance_loss(padded, real), balance_loss(alone, all_real), rtol=1e-6)
    np.testing.assert_allclose(z_loss(logits, real), z_loss(few, all_real), rtol=1e-6)
    with_padding, without = routing_traces(padded, real), routing_traces(alone, all_real)
    assert (with_padding["choices"][:, 4:] == -1).all()
    assert (with_padding.pop("choices")[:, :4] == without.pop("choices")).all()
    for name, value in without.items():
        np.testing.assert_allclose(with_padding[name], value, rtol=1e-5, err_msg=name)


def test_nothing_but_padding_is_finite():
    routing, real = TopK(2)(jnp.zeros((1, 3, 4))), jnp.zeros((1, 3), bool)
    losses = balance_loss(routing, real), z_loss(jnp.zeros((1, 3, 4)), real)
    assert all(np.isfinite(value).all() for value in (*losses, *routing_traces(routing, real).values()))


@pytest.mark.parametrize("fields, named", [
    (dict(k=0), "TopK.k = 0"),
    (dict(k=2, softmax="during"), "TopK.softmax = 'during'"),
    (dict(k=2, softmax="after", renormalise=True), "TopK.renormalise = True"),
    (dict(k=1, softmax="after"), "TopK.k = 1"),
    (dict(k=1, renormalise=True), "TopK.k = 1"),
])
def test_bad_fields(fields, named):
    with pytest.raises(ValueError, match=named):
        TopK(**fields)
