"""The mLSTM and both its blocks against a slow float64 loop written from the papers, without stabilisers; large gates;
initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.recurrence.forms import Chunked, Sequential
from archlab.recurrence.mlstm import MLSTM, CellState, mlstm
from archlab.recurrence.mlstm_large import MLSTMLarge
from tests.helpers import tokens_of
from tests.recurrence.against import check, sigmoid, silu


def cell(q, k, v, i, f, eps=1e-6):
    """One head over one document [T, N], [T, P], [T] (arXiv:2405.04517, equations 19 to 27); m only for eps."""
    C, n, m, h = np.zeros((q.shape[1], v.shape[1])), np.zeros(q.shape[1]), 0, []
    for t in range(len(q)):
        key, log_f = k[t] / np.sqrt(len(k[t])), -np.log1p(np.exp(-f[t]))
        C = np.exp(log_f) * C + np.exp(i[t]) * np.outer(key, v[t])
        n = np.exp(log_f) * n + np.exp(i[t]) * key
        m = max(log_f + m, i[t])
        h.append(q[t] @ C / (max(abs(q[t] @ n), 1) + eps * np.exp(m)))
    return np.stack(h)


def normed(h, gain, eps):
    h = h - h.mean(-1, keepdims=True)
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + eps) * gain


def block(w, x):
    """Figure 11."""
    inner, T, H = x @ w["into"], len(x), len(w["input_bias"])
    mixed = silu(np.stack([w["conv/bias"] + sum(tap * inner[t - j] for j, tap in enumerate(w["conv/weight"][::-1])
                                                if t >= j) for t in range(T)]))
    small = lambda a, name: np.concatenate([a[:, 4 * b:4 * b + 4] @ w[name][b] for b in range(len(w[name]))], 1)
    q, k, v = small(mixed, "query"), small(mixed, "key"), small(inner, "value")
    i, f = (sum(a @ w[f"{gate}_gate"][c] for c, a in enumerate((q, k, v))) + w[f"{gate}_bias"]
            for gate in ("input", "forget"))
    heads = [cell(*(np.split(a, H, 1)[h] for a in (q, k, v)), i[:, h], f[:, h]) for h in range(H)]
    h = np.concatenate([normed(a, gain, 1e-5) for a, gain in zip(heads, w["norm/scale"])], 1)
    return ((h + w["skip"] * mixed) * silu(x @ w["gate"])) @ w["out"]


def large(w, x):
    """arXiv:2503.13427, section 3.1, with gates capped at 2."""
    y = 0
    for h in range(len(w["input_bias"])):
        i, f = (2 * np.tanh((x @ w[f"{gate}_gate"][:, h] + w[f"{gate}_bias"][h]) / 2) for gate in ("input", "forget"))
        out = cell(*(x @ w[name][:, h] for name in ("query", "key", "value")), i, f)
        y = y + (normed(out, w["norm/scale"][h], 1e-6) * sigmoid(x @ w["gate"][:, h])) @ w["out"][h]
    return y


@pytest.mark.parametrize("config, reference", [
    (MLSTM(2, expand=3, conv=3, form=Chunked(3)), block),
    (MLSTMLarge(2, values=1.5, gate_cap=2.0, form=Sequential()), large)], ids=["paper", "large"])
def test_mlstm_is_the_papers(float64, config, reference):
    check(config, reference)


def test_gates_far_beyond_what_an_exponential_holds(float64):
    """float32 with gates of some hundreds, against the float64 loop with gates shifted where the result is the same."""
    source = np.random.default_rng(0)
    q, k, v = source.normal(size=(3, 1, 1, 30, 4))
    i, f = source.normal(size=(2, 1, 1, 30)) * 3
    run = jax.jit(lambda *a: mlstm(*(jnp.asarray(b, jnp.float32) for b in a), tokens_of(np.ones((1, 30))),
                                   CellState.zeros(1, 1, 4, 4, jnp.float32))[0])
    h = run(q, k, v, i + 300, f)
    want = cell(*(a[0, 0] for a in (q, k, v)), i[0, 0] + 300, f[0, 0])  # above 1, only ratios of gates matter
    np.testing.assert_allclose(h[0, 0], want, rtol=2e-3, atol=1e-4)
    assert np.abs(run(q, k, v, i - 300, f - 500)).max() == 0
    gradients = jax.jit(jax.grad(lambda *a: (run(*a) ** 2).sum(), argnums=range(5)))
    for gates in ((i + 300, f), (i - 300, f - 500), (i, f + 300)):
        assert all(np.isfinite(g).all() for g in gradients(q, k, v, *gates))


def test_published_initialisation():
    p = parameters_of(MLSTM(4).build(nnx.Rngs(0), Place(512, 0, 24)))
    sizes = {"into": (2 / 5 / 512) ** 0.5, "value": (2 / 5 / 512) ** 0.5, "out": 2 / 24 / 512**0.5, "input_gate": 0,
             "forget_gate": 0}
    for name, size in sizes.items():
        assert np.std(p[name][...]) == pytest.approx(size, rel=0.05), name
    np.testing.assert_allclose(p["forget_bias"][...], [3, 4, 5, 6])
    assert {path for path, q in p.items() if not q.decay} == {
        "conv/bias", "input_bias", "forget_bias", "norm/scale", "skip"}
    p = parameters_of(MLSTMLarge(4).build(nnx.Rngs(0), Place(512, 0, 48)))  # 24 blocks of two branches
    assert np.std(p["out"][...]) == pytest.approx(2 / 24 / 512**0.5, rel=0.05)
    assert (p["input_bias"][...] == -10).all()
    assert p["query"].shape == (512, 4, 64) and p["value"].shape == (512, 4, 128)


def test_fields_that_do_not_fit():
    with pytest.raises(ValueError, match="MLSTM.heads = 3: must divide the 16 channels"):
        MLSTM(3).check(8)
    with pytest.raises(ValueError, match="MLSTM.expand = 1: the 6 channels must divide into blocks of 4"):
        MLSTM(3, expand=1).check(6)
    with pytest.raises(ValueError, match="MLSTMLarge.keys = 0.5: gives 3 channels"):
        MLSTMLarge(2).check(6)
