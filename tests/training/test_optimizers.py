"""Schedules against their closed forms; which parameters decay, and what Muon and Adafactor take for matrices."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import archlab
from archlab.layers.alphabet import is_matrix
from archlab.training.factored import matrix_axes, scale_by_factored_rms
from archlab.training.optimizers import NAMES, Optimizer, muon_labels
from archlab.training.step import parameters


class Weight:
    """Stands for an `nnx.Param` that says its letters."""

    def __init__(self, letters, decay=True, rate=1.0):
        self.letters, self.decay, self.rate = letters, decay, rate


def test_cosine():
    rate = Optimizer(learning_rate=2.0, warmup=0.1, floor=0.25).rate(100)
    for i in range(10):
        assert float(rate(i)) == pytest.approx(2 * (i + 1) / 10)
    for i in (10, 37, 99):
        falling = (1 + math.cos(math.pi * (i - 10) / 90)) / 2
        assert float(rate(i)) == pytest.approx(2 * (0.25 + 0.75 * falling), rel=1e-5)
    assert float(rate(100)) == pytest.approx(0.5)


def test_wsd():
    rate = Optimizer(learning_rate=2.0, schedule="wsd", warmup=0.1, decay=0.2, floor=0.0).rate(100)
    assert float(rate(0)) == pytest.approx(0.2)
    assert all(float(rate(i)) == pytest.approx(2.0) for i in range(9, 81))
    for i in (81, 90, 99):
        assert float(rate(i)) == pytest.approx(2 * (1 - math.sqrt((i - 80) / 20)), rel=1e-5)


def test_constant():
    rate = Optimizer(learning_rate=2.0, schedule="constant", warmup=0.0).rate(100)
    assert all(float(rate(i)) == pytest.approx(2.0) for i in (0, 1, 50, 99))


@pytest.mark.parametrize("field, value", [("name", "adam"), ("schedule", "cosin"), ("learning_rate", 0.0),
                                          ("warmup", 1.5), ("b1", 1.0), ("clip", -1.0)])
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"Optimizer.{field} = {value!r}"):
        Optimizer(**{field: value})


@pytest.mark.parametrize("letters, rows, columns", [
    ("D->F", (0,), (1,)), ("LD->HK", (1,), (2, 3)), ("LHK->D", (1, 2), (3,)), ("LED->F", (2,), (3,)),
    ("D->E", (0,), (1,)), ("LD->D", (1,), (2,))])
def test_rows_and_columns(letters, rows, columns):
    assert matrix_axes(letters) == (rows, columns)


def test_only_what_wants_to_be_small_decays():
    """With a gradient of zero, one step moves what decays and nothing else: norms, biases and time constants stay."""
    weights = {**parameters(archlab.get_config("mamba-nano")), **parameters(archlab.get_config("transformer-nano"))}
    values = {path: jnp.ones(weight.shape) for path, weight in weights.items()}
    for name in NAMES:
        optimizer = Optimizer(name, weight_decay=0.5)
        transform = optimizer.build(weights)
        zeros = jax.tree.map(jnp.zeros_like, values)
        updates, _ = jax.jit(transform.update)(zeros, transform.init(values), values)
        for path, update in updates.items():
            chex.assert_trees_all_close(update, jnp.full_like(update, -0.5 if weights[path].decay else 0.0), atol=1e-6)
    assert not any(weight.decay for path, weight in weights.items() if path.endswith(("A_log", "scale", "step_bias")))


@pytest.mark.parametrize("name", NAMES)
def test_rates_of_their_own(name):
    """Each moves by its multiple of what it would move by, decay included; with a rate of 0 it stays."""
    weights = {path: Weight("D->F", rate=rate) for path, rate in (("all", 1.0), ("slow", 0.1), ("fixed", 0.0))}
    value = jax.random.normal(jax.random.key(0), (4, 3))
    values = dict.fromkeys(weights, value)
    transform = Optimizer(name, weight_decay=0.5, clip=0).build(weights)
    updates, _ = jax.jit(transform.update)(dict.fromkeys(weights, value + 1), transform.init(values), values)
    assert (np.abs(updates["all"]) > 0).all() and (np.asarray(updates["fixed"]) == 0).all()
    chex.assert_trees_all_close(updates["slow"], 0.1 * updates["all"], rtol=1e-5)


def test_muon_takes_matrices_by_letters():
    letters = {path: weight.letters for path, weight in parameters(archlab.get_config("transformer-nano")).items()}
    labels = muon_labels(letters)
    assert labels["body/unit/layers/0/layer/query"] == "matrix"  # four axes, LD->HK
    norms = [path for path, word in letters.items() if word == "L->D"]  # two axes, but norms of layers side by side
    assert norms and all(labels[path] == "other" for path in norms)
    assert labels["embed/table"] == "other"
    assert all((label == "matrix") == is_matrix(letters[path]) for path, label in labels.items())


def test_muon_orthogonalises_each_copy():
    """The stacked update is that of each layer alone; its singular values are near 0.2 sqrt(max(rows, columns))."""
    gradient = jax.random.normal(jax.random.key(0), (3, 16, 2, 4))
    optimizer = Optimizer("muon", weight_decay=0, clip=0)

    def update(letters, value):
        transform = optimizer.build({"w": Weight(letters)})
        return jax.jit(transform.update)({"w": value}, transform.init({"w": value}), {"w": value})[0]["w"]

    stacked = update("LD->HK", gradient)
    for copy in range(3):
        chex.assert_trees_all_close(stacked[copy], update("D->HK", gradient[copy]), rtol=1e-4, atol=1e-5)
    values = np.linalg.svd(np.asarray(stacked[0]).reshape(16, 8), compute_uv=False) / (0.2 * 4)
    assert 0.5 < values.min() and values.max() < 1.4


def test_adafactor_against_a_loop():
    """Two steps on stacked matrices [L, D, H, K], against a float64 loop over layers from the paper's algorithm 4."""
    gradients = [np.random.default_rng(i).normal(size=(2, 6, 3, 4)) for i in range(2)]
    transform = scale_by_factored_rms({"w": "LD->HK"})
    state = transform.init({"w": jnp.zeros((2, 6, 3, 4))})
    chex.assert_shape(state.rows["w"], (2, 6, 1, 1))
    chex.assert_shape(state.columns["w"], (2, 1, 3, 4))
    for gradient in gradients:
        updates, state = transform.update({"w": jnp.asarray(gradient, jnp.float32)}, state)
    for layer in range(2):
        row, column = np.zeros(6), np.zeros(12)
        for step, gradient in enumerate(gradients, start=1):
            square = gradient[layer].reshape(6, 12) ** 2 + 1e-30
            keep = 1 - step**-0.8
            row, column = keep * row + (1 - keep) * square.mean(1), keep * column + (1 - keep) * square.mean(0)
            expected = gradient[layer].reshape(6, 12) / np.sqrt(np.outer(row, column) / row.mean())
            expected /= max(1, np.sqrt((expected**2).mean()))
        update = np.asarray(updates["w"][layer]).reshape(6, 12)
        chex.assert_trees_all_close(update, expected.astype(np.float32), rtol=1e-4)


def test_clip_by_global_norm():
    transform = Optimizer(clip=1.0, weight_decay=0).build({"w": Weight("D->F")})
    big, small = ({"w": jnp.full((2, 2), value)} for value in (50.0, 0.5))  # global norms 100 and 1
    first, _ = transform.update(big, transform.init(big), big)
    second, _ = transform.update(small, transform.init(small), small)
    chex.assert_trees_all_close(first, second, rtol=1e-5)
    assert float(optax.tree.norm(second)) > 0
