"""The losses against closed forms, and what is traced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.experts.balance import ImportanceLoss, LoadLoss, SwitchLoss, ZLoss, routing_traces
from archlab.experts.routers import Routing, TopK

BATCH, SEQUENCE = SwitchLoss(), SwitchLoss(per="sequence")
ALL = (BATCH, SEQUENCE, SwitchLoss(first=1), ImportanceLoss(), LoadLoss(), ZLoss())


def even(E, k):
    """A batch [2, E] in which each expert is chosen equally often, with equal probabilities."""
    experts = (jnp.arange(E)[:, None] + jnp.arange(k)) % E
    experts, probs = jnp.broadcast_to(experts, (2, E, k)), jnp.full((2, E, E), 1 / E)
    return Routing(experts, jnp.full((2, E, k), 1 / k), probs, probs, jnp.zeros((2, E, E))), jnp.ones((2, E), bool)


def collapsed(E=4):
    return TopK(1)(jnp.full((2, 5, E), -100.0).at[..., 2].set(100.0)), jnp.ones((2, 5), bool)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_even_routing(k):
    routing, real = even(4, k)
    np.testing.assert_allclose([loss(routing, real) for loss in ALL], [1, 1, 1, 0, 0, np.log(4) ** 2], atol=1e-6)
    traces = routing_traces(routing, real)
    np.testing.assert_allclose(traces["load"], np.full(4, 0.25), rtol=1e-6)
    np.testing.assert_allclose(traces["max_violation"], 0, atol=1e-6)
    np.testing.assert_allclose([traces["entropy"], traces["mean_entropy"]], np.log(4), rtol=1e-6)


@pytest.mark.parametrize("E", [4, 8])
def test_collapsed_routing(E):
    routing, real = collapsed(E)
    np.testing.assert_allclose([loss(routing, real) for loss in ALL[:5]], [E, E, E, E - 1, E - 1], rtol=1e-6)
    traces = routing_traces(routing, real)
    assert traces["load"].tolist() == np.eye(E)[2].tolist() and traces["max_violation"] == E - 1
    np.testing.assert_allclose([traces["entropy"], traces["mean_entropy"]], 0, atol=1e-6)
    assert traces["largest_logit"] == 100


def test_batch_and_sequence_differ():
    """Each sequence on an expert of its own: even over the batch, collapsed in each sequence."""
    logits = 100 * jnp.broadcast_to(jnp.eye(4)[:, None], (4, 6, 4))
    routing, real = TopK(1)(logits), jnp.ones((4, 6), bool)
    np.testing.assert_allclose([BATCH(routing, real), SEQUENCE(routing, real)], [1, 4], rtol=1e-6)


def test_sequence_loss_by_hand():
    """DeepSeek-V3's equations 17 to 20 as they stand: the mean over sequences of sum f_i P_i, f_i = E/(k T) counts."""
    logits, k, E = jax.random.normal(jax.random.key(0), (3, 7, 5)), 2, 5
    routing = TopK(k, "sigmoid", True)(logits)
    s = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    share = s / s.sum(-1, keepdims=True)
    losses = []
    for row in range(3):
        counts = np.zeros(E)
        for t in range(7):
            for e in np.argsort(-s[row, t])[:k]:
                counts[e] += 1
        losses.append((E / (k * 7) * counts * share[row].mean(0)).sum())
    np.testing.assert_allclose(SEQUENCE(routing, jnp.ones((3, 7), bool)), np.mean(losses), rtol=1e-5)


def test_first_choices_alone():
    """All first choices on one expert, second ones spread: only `first=1` sees a collapse of the choices."""
    routing, real = even(4, 2)
    routing = dataclasses.replace(routing, experts=routing.experts.at[..., 0].set(3),
                                  probs=jnp.broadcast_to(jnp.eye(4)[3], (2, 4, 4)))
    np.testing.assert_allclose(SwitchLoss(first=1)(routing, real), 4, rtol=1e-6)
    assert SwitchLoss()(routing, real) < 3


def test_load_loss_judges_chances():
    routing, real = collapsed()
    fair = dataclasses.replace(routing, chances=jnp.full((2, 5, 4), 0.25))
    np.testing.assert_allclose([LoadLoss()(routing, real), LoadLoss()(fair, real)], [3, 0], atol=1e-6)


def test_decided_tokens_in_a_balanced_batch():
    """Each token certain of an expert of its own: no entropy in a token, all of it in their mean."""
    traces = routing_traces(TopK(1)(100 * jnp.eye(4)[None]), jnp.ones((1, 4), bool))
    np.testing.assert_allclose([traces["entropy"], traces["mean_entropy"]], [0, np.log(4)], atol=1e-6)


def test_z_loss_closed_form():
    real = jnp.array([[True, True, False]])
    logits = jnp.stack([jnp.zeros(4), jnp.full(4, 3.0), jnp.full(4, 50.0)])[None]
    np.testing.assert_allclose(ZLoss()(TopK(1)(logits), real), (np.log(4) ** 2 + (3 + np.log(4)) ** 2) / 2, rtol=1e-6)


def test_padding_counts_nowhere():
    logits = jax.random.normal(jax.random.key(0), (3, 6, 4))
    real = jnp.array([[True] * 4 + [False] * 2] * 2 + [[False] * 6])
    padded, alone, all_real = TopK(2)(logits), TopK(2)(logits[:2, :4]), jnp.ones((2, 4), bool)
    for loss in ALL:
        np.testing.assert_allclose(loss(padded, real), loss(alone, all_real), rtol=1e-5, err_msg=loss.name)
    with_padding, without = routing_traces(padded, real), routing_traces(alone, all_real)
    assert (with_padding["choices"][:, 4:] == -1).all() and (with_padding["choices"][2] == -1).all()
    for name in ("choices", "weights"):
        np.testing.assert_allclose(with_padding.pop(name)[:2, :4], without.pop(name), rtol=1e-6)
    for name, value in without.items():
        np.testing.assert_allclose(with_padding[name], value, rtol=1e-5, err_msg=name)


def test_nothing_but_padding_is_finite():
    routing, real = TopK(2)(jnp.zeros((1, 3, 4))), jnp.zeros((1, 3), bool)
    values = [loss(routing, real) for loss in ALL] + list(routing_traces(routing, real).values())
    assert all(np.isfinite(value).all() for value in values)


def test_logits_that_are_not_finite_are_seen():
    logits = jnp.zeros((1, 3, 4)).at[0, 1, 2].set(jnp.nan)
    assert np.isnan(routing_traces(TopK(2)(logits), jnp.ones((1, 3), bool))["largest_logit"])


@pytest.mark.parametrize("make, named", [
    (lambda: SwitchLoss(-0.1), "SwitchLoss.weight = -0.1"),
    (lambda: SwitchLoss(per="row"), "SwitchLoss.per = 'row'"),
    (lambda: SwitchLoss(first=0), "SwitchLoss.first = 0"),
    (lambda: ZLoss(-1.0), "ZLoss.weight = -1.0"),
])
def test_bad_fields(make, named):
    with pytest.raises(ValueError, match=named):
        make()
