"""Retention against the three forms of its paper, which agree, and its initialisation."""

import numpy as np
import pytest
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.recurrence.forms import Chunked, Sequential
from archlab.recurrence.retention import Retention
from tests.recurrence.against import check, rms, silu


def turned(a, t):
    """Channels as complex pairs, turned by the place t (equation 3)."""
    N = len(a)
    pairs = (a[0::2] + 1j * a[1::2]) * np.exp(1j * t / 10000 ** np.linspace(0, 1, N // 2))
    return np.stack([pairs.real, pairs.imag], -1).ravel()


def gamma(h):
    return 1 - 2.0 ** (-5 - h)


def recurrent(q, k, v, h):
    S, y = 0, []
    for t in range(len(q)):
        S = gamma(h) * S + np.outer(k[t], v[t])
        y.append(q[t] @ S)
    return np.stack(y)


def parallel(q, k, v, h):
    apart = np.subtract.outer(np.arange(len(q)), np.arange(len(q)))
    return (q @ k.T * np.where(apart >= 0, gamma(h) ** np.maximum(apart, 0), 0)) @ v


def chunkwise(q, k, v, h, size=3):
    """Equation 7: within a chunk in parallel, between chunks by the state."""
    R, y = np.zeros((q.shape[1], v.shape[1])), []
    for at in range(0, len(q), size):
        qc, kc, vc = (a[at:at + size] for a in (q, k, v))
        place = np.arange(len(qc))[:, None]
        y.append(parallel(qc, kc, vc, h) + (qc @ R) * gamma(h) ** (place + 1))
        R = kc.T @ (vc * gamma(h) ** (len(qc) - 1 - place)) + gamma(h) ** len(qc) * R
    return np.concatenate(y)


def reference(retain):
    def layer(w, x):
        out = 0
        for h in range(w["query"].shape[1]):
            q, k = (np.stack([turned(row, t) for t, row in enumerate(x @ w[name][:, h])]) for name in ("query", "key"))
            y = rms(retain(q, k / np.sqrt(q.shape[1]), x @ w["value"][:, h], h))
            out = out + (silu(x @ w["gate"][:, h]) * y) @ w["out"][h]
        return out

    return layer


@pytest.mark.parametrize("form, retain", [(None, parallel), (Sequential(), recurrent), (Chunked(3), chunkwise)])
def test_retention_is_the_papers(float64, form, retain):
    check(Retention(2, form=form), reference(retain))


def test_the_papers_forms_agree():
    q, k, v = np.random.default_rng(0).normal(size=(3, 11, 4))
    for h in range(3):
        np.testing.assert_allclose(chunkwise(q, k, v, h), parallel(q, k, v, h), rtol=1e-12)
        np.testing.assert_allclose(recurrent(q, k, v, h), parallel(q, k, v, h), rtol=1e-12)


def test_published_initialisation():
    p = parameters_of(Retention(4).build(nnx.Rngs(0), Place(64)))
    bound = lambda fan_in, fan_out: (6 / (fan_in + fan_out)) ** 0.5
    bounds = {"query": bound(64, 64) * 2**-2.5, "gate": bound(64, 128) * 2**-2.5, "out": bound(128, 64)}
    for name, want in bounds.items():
        assert np.abs(p[name][...]).max() == pytest.approx(want, rel=0.01)
    assert sum(q.size for q in p.values()) == 8 * 64**2  # section 3.1: 8 D^2


def test_widths_that_do_not_divide():
    with pytest.raises(ValueError, match="Retention.heads = 4.*width 12"):
        Retention(4).check(12)
    with pytest.raises(ValueError, match="Retention.expand = 0"):
        Retention(4, expand=0)
