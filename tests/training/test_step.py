"""The training step: every architecture can learn a batch by heart, and accumulation is the big batch."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import archlab
from archlab.data import Batch
from archlab.layers.weights import merge
from archlab.training.evaluation import evaluate, make_evaluate_step
from archlab.training.optimizers import Optimizer
from archlab.training.step import create_state, make_train_step, move, parameters
from tests.helpers import representatives

BYTES = np.ones(256, np.int32)


def batch_of(rows, length, seed=0):
    """Random letters; each row holds two documents and ends with padding."""
    ids = np.random.default_rng(seed).integers(97, 123, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length + 1), np.int32)
    segments[:, length // 2 :] = 2
    for row in range(rows):
        segments[row, length - row % 3 :] = 0
    weights = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return Batch(ids[:, :-1], ids[:, 1:], segments[:, :-1], weights.astype(np.float32))


def start(name, optimizer=Optimizer(), **options):
    config = archlab.get_config(name)
    transform = optimizer.build(parameters(config))
    structure, state, _ = create_state(config, transform, 0)
    return structure, state, make_train_step(structure, transform, BYTES, **options)


# What sees both ways is asked for other tokens each time: tests/test_encoder_decoder.py.
@pytest.mark.parametrize("name", [n for n in representatives() if archlab.get_config(n).body.causal])
def test_overfits_one_batch(name):
    _, state, step = start(name)
    batch = batch_of(2, 24)
    losses = []
    for _ in range(80):
        state, metrics = step(state, batch, 1e-2)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 4 and losses[-1] < 1, f"{name}: from {losses[0]:.2f} to {losses[-1]:.2f} nats a token"


@pytest.mark.parametrize("name", ["transformer-nano", "mamba-nano"])
def test_accumulation_is_the_big_batch(name):
    """Losses are divided once by all real targets, though micro-batches hold different numbers of them.

    With plain gradient descent: Adam makes whole steps of gradients that are nothing but round-off.
    """
    config, results = archlab.get_config(name), []
    for accumulate in (1, 3):
        structure, state, _ = create_state(config, optax.sgd(1.0), 0)
        step = make_train_step(structure, optax.sgd(1.0), BYTES, accumulate=accumulate)
        for i in range(2):
            state, metrics = step(state, batch_of(6, 12, seed=i))
        results.append((state.params, metrics["loss"], metrics["bits_per_byte"]))
    chex.assert_trees_all_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_loss_counts_real_targets_only():
    """The first step's loss is the mean over weighted targets of -log softmax, worked out apart."""
    structure, state, step = start("transformer-nano")
    batch = batch_of(3, 16)
    model = merge(structure, state.params, state.rest)
    logits = np.asarray(jax.jit(lambda model: model(batch.ids, segment_ids=batch.segments).logits)(model), np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    expected = (nll * batch.weights).sum() / batch.weights.sum()
    _, metrics = step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["bits_per_byte"]) == pytest.approx(expected / math.log(2), rel=1e-5)


def test_bits_per_byte_counts_bytes():
    config = archlab.get_config("transformer-nano")
    transform = Optimizer().build(parameters(config))
    structure, state, _ = create_state(config, transform, 0)
    step = make_train_step(structure, transform, np.full(256, 3, np.int32))
    _, metrics = step(state, batch_of(2, 16))
    assert float(metrics["bits_per_byte"]) == pytest.approx(float(metrics["loss"]) / math.log(2) / 3, rel=1e-5)


def test_the_state_is_consumed():
    _, state, step = start("transformer-nano")
    step(state, batch_of(2, 16))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_updates_are_added_by_path():
    rest = {"body/bias": jnp.zeros(2), "body/other": jnp.ones(1)}
    moved = move(rest, {"body/bias": jnp.array([0.5, -0.5])}, {})
    chex.assert_trees_all_close(moved, {"body/bias": jnp.array([0.5, -0.5]), "body/other": jnp.ones(1)})
    with pytest.raises(ValueError, match="body/nothing"):
        move(rest, {"body/nothing": jnp.zeros(2)}, {})


def test_evaluation_sums():
    """Several batches give what one gives; the ranges of places cover every target once."""
    structure, state, _ = start("transformer-nano")
    step = make_evaluate_step(structure, BYTES)
    whole = batch_of(4, 16)
    halves = [jax.tree.map(lambda a: a[i : i + 2], whole) for i in (0, 2)]
    one, two = (evaluate(step, state.params, state.rest, batches) for batches in ([whole], halves))
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    assert one.targets.sum() == whole.weights.sum() == one.bytes
    assert one.targets[8:].sum() == 0  # documents are 8 tokens long
    rows = one.by_position()
    assert [row[:2] for row in rows] == [(0, 0), (1, 1), (2, 3), (4, 7)]
    assert sum(row[3] for row in rows) == whole.weights.sum()
    with pytest.raises(ValueError, match="no batch"):
        evaluate(step, state.params, state.rest, [])
