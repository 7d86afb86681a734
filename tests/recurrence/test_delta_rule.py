"""The delta rule's forms against a slow float64 loop and against one another, its memory, its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.recurrence.delta_rule import delta_rule
from archlab.recurrence.forms import Associative, Chunked, Sequential
from archlab.recurrence.memory import MemoryState
from archlab.recurrence.triangular import unit_inverse
from tests.helpers import tokens_of

B, G, H, N, P = 2, 2, 4, 6, 5


def inputs(length, dtype=jnp.float64):
    """q, k, v, beta, g, segments, S: documents that begin and end anywhere; the first goes on from before the piece."""
    draw = np.random.default_rng(length)
    q, k = draw.normal(size=(2, B, G, length, N))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta, g = draw.uniform(0, 2, (B, H, length)), -draw.exponential(size=(B, H, length)) ** 3
    segments = 1 + np.sort(draw.integers(0, 4, (B, length)))
    segments[0, 0] = 1
    segments[1, length - length // 4:] = 0
    v, S = draw.normal(size=(B, H, length, P)), draw.normal(size=(B, H, N, P))
    floats = (jnp.asarray(a, dtype) for a in (q, k, v, beta, g))
    return *floats, segments, jnp.asarray(S, dtype)


def run(form, q, k, v, beta, g, segments, S):
    y, state = delta_rule(q, k, v, beta, g, tokens_of(segments), MemoryState(S, jnp.ones(B, jnp.int32)), form)
    return y, state.matrix, state.segment


def loop(q, k, v, beta, g, segments, S):
    """Token by token: forget, recall, correct, read."""
    q, k, v, beta, g, S = (np.array(a) for a in (q, k, v, beta, g, S))
    y = np.zeros(v.shape)
    for b in range(B):
        for h in range(H):
            last = 1
            for t in np.flatnonzero(segments[b]):
                if segments[b, t] != last:
                    S[b, h], last = 0, segments[b, t]
                key = k[b, h // (H // G), t]
                S[b, h] *= np.exp(g[b, h, t])
                S[b, h] += beta[b, h, t] * np.outer(key, v[b, h, t] - key @ S[b, h])
                y[b, h, t] = q[b, h // (H // G), t] @ S[b, h]
    return y, S


@pytest.mark.parametrize("form, length", [(None, 1), (None, 75), (Sequential(), 48), (Chunked(24), 48)], ids=str)
def test_forms_are_the_loop(float64, form, length):
    args = inputs(length)
    y, S, last = jax.jit(lambda *a: run(form, *a[:5], args[5], a[5]))(*args[:5], args[6])
    real, (want, matrix) = args[5] > 0, loop(*args)
    np.testing.assert_allclose(np.moveaxis(y, 2, 1)[real], np.moveaxis(want, 2, 1)[real], rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(S, matrix, rtol=1e-10, atol=1e-11)
    assert (last == args[5].max(1)).all()


@pytest.mark.parametrize("decay", ["some", "none and all"])
@pytest.mark.parametrize("length", [5, 75])
def test_gradients_are_those_of_the_steps(float64, length, decay):
    """Every output has a weight of its own. One row without decay, as in DeltaNet, one where it is total in places."""
    *args, g, segments, S = inputs(length)
    if decay == "none and all":
        g = jnp.stack([0 * g[0], jnp.where(g[1] < -6, -jnp.inf, g[1])])
    real = (segments > 0)[:, None, :, None]

    def weighed(form, *floats):
        y, S, _ = run(form, *floats[:5], segments, floats[5])
        y = jnp.where(real, y, 0)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum() + (S**2).sum(), (y, S)

    run_all = lambda form: jax.jit(jax.grad(lambda *a: weighed(form, *a), range(6), has_aux=True))(*args, g, S)
    for got, want in zip(*(jax.tree.leaves(run_all(form)) for form in (Chunked(24), Sequential()))):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


def test_float32_is_accurate():
    """Also where a document's keys are nearly alike: the corrections of a chunk then lean on one another the most."""
    q, k, v, beta, g, segments, S = inputs(96, jnp.float32)
    alike = k[:, :, :1] + 0.05 * k
    alike /= jnp.linalg.norm(alike, axis=-1, keepdims=True)
    for k in (k, alike):
        args = (q, k, v, beta, g / 10, segments, S)
        y, S_after, _ = jax.jit(lambda: run(Chunked(32), *args))()
        want, matrix = loop(*(np.asarray(a, np.float64) for a in args[:5]), segments, np.asarray(S, np.float64))
        real = (segments > 0)[:, None, :, None]
        assert np.abs(np.where(real, y - want, 0)).max() < 1e-5 * np.abs(want).max()
        assert np.abs(S_after - matrix).max() < 1e-5 * np.abs(matrix).max()


@pytest.mark.parametrize("size", [1, 7, 16, 40, 63])
def test_unit_inverse(float64, size):
    A = np.random.default_rng(size).uniform(-0.5, 0.5, (3, size, size))
    np.testing.assert_allclose(unit_inverse(jnp.asarray(A)) @ (np.eye(size) + np.tril(A, -1)),
                               np.broadcast_to(np.eye(size), A.shape), atol=1e-9)


def test_unit_inverse_where_products_of_powers_fail():
    """All keys alike, and nearly everything corrected twice over: the powers of A reach 1e20, the inverse only 2."""
    A = np.tril(np.full((64, 64), 1.99), -1)
    np.testing.assert_allclose(unit_inverse(jnp.asarray(A, jnp.float32)), np.linalg.inv(np.eye(64) + A), atol=2e-4)


def test_memory_holds_one_state_a_chunk():
    """The backward pass of a long piece keeps far less than one state a step."""
    length, N = 1024, 32
    zeros = lambda *shape: jnp.zeros((1, 2, *shape))
    args = zeros(length, N), zeros(length, N), zeros(length, N), zeros(length), zeros(length)
    tokens, state = tokens_of(np.ones((1, length))), MemoryState.zeros(1, 2, N, N, jnp.float32)
    grad = jax.jit(jax.grad(lambda *a: delta_rule(*a, tokens, state)[0].sum(), range(5)))
    temporary = grad.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 0.4 * 4 * 2 * length * N * N


def test_it_is_not_associative():
    with pytest.raises(ValueError, match="Sequential.*Chunked.*Kernel"):
        run(Associative(), *inputs(5, jnp.float32))
