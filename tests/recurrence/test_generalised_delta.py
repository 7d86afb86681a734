"""The generalised delta rule's forms against a slow float64 loop and against one another, its memory, its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.recurrence.forms import Associative, Chunked, Sequential
from archlab.recurrence.generalised_delta import generalised_delta
from archlab.recurrence.memory import MemoryState
from tests.helpers import tokens_of

B, H, N, P = 2, 2, 6, 5


def inputs(length, decay="mild", dtype=jnp.float64):
    """q, k, v, a, b, g, segments, S: documents that begin and end anywhere; the first goes on from before the piece.

    decay: "mild", as in RWKV-7; or "any": in most chunks, too strong for them to be computed at once.
    """
    draw = np.random.default_rng(length)
    q, k, a = draw.normal(size=(3, B, H, length, N))
    a /= np.linalg.norm(a, axis=-1, keepdims=True)
    b = -a * draw.uniform(size=(B, H, length, N))
    g = draw.uniform(0, 0.606, (B, H, length, N))
    if decay == "any":
        strong = (draw.uniform(size=g.shape) < 0.2) & (np.arange(length) < 50)[:, None]
        g = np.where(strong, draw.choice([12.0, np.inf], g.shape), g)
    segments = 1 + np.sort(draw.integers(0, 4, (B, length)))
    segments[0, 0] = 1
    segments[1, length - length // 4:] = 0
    v, S = draw.normal(size=(B, H, length, P)), draw.normal(size=(B, H, N, P))
    floats = (jnp.asarray(x, dtype) for x in (q, k, v, a, b, -g))
    return *floats, segments, jnp.asarray(S, dtype)


def run(form, q, k, v, a, b, g, segments, S):
    y, state = generalised_delta(q, k, v, a, b, g, tokens_of(segments), MemoryState(S, jnp.ones(B, jnp.int32)), form)
    return y, state.matrix, state.segment


def loop(q, k, v, a, b, g, segments, S):
    """Token by token: the transition as a matrix."""
    q, k, v, a, b, g, S = (np.array(x, np.float64) for x in (q, k, v, a, b, g, S))
    y = np.zeros(v.shape)
    for i in np.ndindex(B, H):
        last = 1
        for t in np.flatnonzero(segments[i[0]]):
            if segments[i[0], t] != last:
                S[i], last = 0, segments[i[0], t]
            transition = np.diag(np.exp(g[i][t])) + np.outer(b[i][t], a[i][t])
            S[i] = transition @ S[i] + np.outer(k[i][t], v[i][t])
            y[i][t] = q[i][t] @ S[i]
    return y, S


def close(got, want, segments, rtol, atol):
    """Outputs where there are tokens, and the state."""
    real = (segments > 0)[:, None, :, None]
    np.testing.assert_allclose(np.where(real, got[0], 0), np.where(real, want[0], 0), rtol, atol)
    np.testing.assert_allclose(got[1], want[1], rtol, atol)


@pytest.mark.parametrize("form, length", [(None, 1), (None, 75), (Sequential(), 48), (Chunked(24), 48)], ids=str)
def test_forms_are_the_loop(float64, form, length):
    args = inputs(length)
    y, S, last = jax.jit(lambda *a: run(form, *a[:6], args[6], a[6]))(*args[:6], args[7])
    close((y, S), loop(*args), args[6], 1e-10, 1e-11)
    assert (last == args[6].max(1)).all()


@pytest.mark.parametrize("length, decay", [(5, "mild"), (75, "mild"), (75, "any")])
def test_gradients_are_those_of_the_steps(float64, length, decay):
    *args, segments, S = inputs(length, decay)
    close(run(Chunked(24), *args, segments, S), loop(*args, segments, S), segments, 1e-10, 1e-11)
    real = (segments > 0)[:, None, :, None]

    def weighed(form, *floats):
        y, S, _ = run(form, *floats[:6], segments, floats[6])
        return (jnp.where(real, y, 0) * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum() + (S**2).sum()

    gradients = lambda form: jax.jit(jax.grad(lambda *a: weighed(form, *a), range(7)))(*args, S)
    for got, want in zip(gradients(Chunked(24)), gradients(Sequential())):
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("decay", ["mild", "any"])
def test_float32_is_accurate(decay):
    args = inputs(96, decay, jnp.float32)
    got, want = jax.jit(lambda: run(Chunked(32), *args))(), loop(*args)
    close(got, want, args[6], 0, 1e-5 * max(np.abs(a).max() for a in want))


def test_the_strongest_decay_computed_at_once_is_accurate():
    """Every channel at the very bound, all tokens of one document: factors of exp(64) meet factors of exp(-64)."""
    q, k, v, a, b, g, segments, S = inputs(32, dtype=jnp.float32)
    args = (q, k, v, a, b, jnp.full_like(g, -3.99), np.ones_like(segments), S)
    want = loop(*args)
    close(jax.jit(lambda: run(Chunked(32), *args))(), want, args[6], 0, 1e-5 * np.abs(want[0]).max())
    energy = lambda *floats: (run(Chunked(32), *floats, *args[6:])[0]**2).sum()
    assert all(jnp.isfinite(a).all() for a in jax.jit(jax.grad(energy, range(6)))(*args[:6]))


def test_memory_holds_one_state_a_chunk():
    """The backward pass of a long piece keeps far less than one state a step."""
    length, N = 1024, 32
    args = [jnp.zeros((1, 2, length, N))] * 6
    tokens, state = tokens_of(np.ones((1, length))), MemoryState.zeros(1, 2, N, N, jnp.float32)
    grad = jax.jit(jax.grad(lambda *a: generalised_delta(*a, tokens, state)[0].sum(), range(6)))
    temporary = grad.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 0.6 * 4 * 2 * length * N * N


def test_it_is_not_associative():
    with pytest.raises(ValueError, match="Sequential.*Chunked.*Kernel"):
        run(Associative(), *inputs(5, dtype=jnp.float32))
