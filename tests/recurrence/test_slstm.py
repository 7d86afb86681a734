"""The sLSTM against a slow float64 loop written from the paper, without stabilisers; its initialisation and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.recurrence import slstm
from archlab.recurrence.slstm import SLSTM
from tests.recurrence.against import check, sigmoid, silu


def reference(w, x):
    """Token by token (arXiv:2405.04517, equations 8 to 14 and figure 10)."""
    _, H, K = w["bias"].shape
    y = np.zeros_like(x)
    h, c, n = np.zeros((3, H, K))
    for t in range(len(x)):
        mixed = silu(w["conv/bias"] + sum(tap * x[t - j] for j, tap in enumerate(w["conv/weight"][::-1]) if t >= j))
        sees = [np.stack([a.reshape(H, K)[j] @ w[name][j] for j in range(H)]) for a, name in (
            (mixed, "input_gate"), (mixed, "forget_gate"), (x[t], "value"), (x[t], "output_gate"))]
        i, f, z, o = (sees[g] + w["bias"][g] + np.stack([h[j] @ w["recurrent"][g, j] for j in range(H)])
                      for g in range(4))
        c, n = sigmoid(f) * c + np.exp(i) * np.tanh(z), sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
        out = h - h.mean(-1, keepdims=True)
        y[t] = (out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-5) * w["norm/scale"]).ravel()
    return y


def test_slstm_is_the_papers(float64, monkeypatch):
    monkeypatch.setattr(slstm, "CHUNK", 4)  # pieces of whole chunks, and not
    check(SLSTM(2, conv=3), reference)


def inputs(T, dtype=jnp.float32, size=1.0):
    sees = size * jax.random.normal(jax.random.key(0), (1, T, 4, 2, 8), dtype)
    recurrent = 0.3 * jax.random.normal(jax.random.key(1), (4, 2, 8, 8), dtype)
    cells = jnp.zeros((4, 1, 2, 8), dtype).at[3].set(slstm.LOWEST)
    no = jnp.zeros((1, T), bool)
    return sees, recurrent, jnp.zeros((4, 2, 8), dtype), no, ~no, cells


def test_gradients_do_not_depend_on_chunks_nor_overflow(float64, monkeypatch):
    run = lambda *a: (slstm.slstm(*a)[0] ** 2).sum()
    found = []
    for chunk in (5, 64):
        monkeypatch.setattr(slstm, "CHUNK", chunk)
        found.append(jax.jit(jax.grad(lambda *a: run(*a), argnums=(0, 1, 2)))(*inputs(12, jnp.float64)))
    for a, b in zip(*found):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert all(np.isfinite(g).all() for g in jax.grad(run, (0, 1))(*inputs(12, size=300.0)))


def test_memory_holds_the_cells_once_a_chunk():
    T = 2048
    grad = jax.jit(jax.grad(lambda *a: slstm.slstm(*a)[0].sum(), argnums=(0, 1)))
    temporary = grad.lower(*inputs(T)).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 2 * inputs(T)[0].nbytes  # keeping every step takes 4 times as much


def test_published_initialisation():
    at = lambda index: parameters_of(SLSTM(4).build(nnx.Rngs(0), Place(256, index, 5)))
    p = at(0)
    assert np.std(p["value"][...]) == pytest.approx((2 / 5 / 256) ** 0.5, rel=0.05)
    assert (p["recurrent"][...] == 0).all() and (p["bias"][...][jnp.array([0, 2, 3])] == 0).all()
    np.testing.assert_allclose(p["bias"][...][1, 2], 5 - 12 * (np.arange(64) / 63) ** 0.3, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(at(4)["bias"][...][1, 2], 5 - 12 * (np.arange(64) / 63) ** 1.6, rtol=1e-5, atol=1e-5)
    assert {path for path, q in p.items() if not q.decay} == {"conv/bias", "bias", "norm/scale"}


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="SLSTM.heads = 3: must divide the width 8"):
        SLSTM(3).check(8)
