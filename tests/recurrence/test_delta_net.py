"""DeltaNet and Gated DeltaNet against a slow float64 loop written from their papers, their inits and errors."""

import numpy as np
import pytest
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.recurrence.delta_net import DeltaNet
from archlab.recurrence.forms import Chunked
from archlab.recurrence.gated_delta_net import GatedDeltaNet
from tests.recurrence.against import check, rms, sigmoid, silu, softplus


def short_conv(weight, u):
    """Causal, per channel, then SiLU. weight [W, F], its last row for the token itself; u [T, F]."""
    y = np.zeros_like(u)
    for t in range(len(u)):
        for j in range(min(len(weight), t + 1)):
            y[t] += weight[-1 - j] * u[t - j]
    return silu(y)


def reference(largest_beta):
    """arXiv:2406.06484, equation 1 and section 3.4; with a decay arXiv:2412.06464, equation 10 and figure 1."""
    def layer(w, x):
        T, (_, G, N), (_, H, P) = len(x), w["key"].shape, w["value"].shape
        q, k, v = (short_conv(w[f"convs/{i}/weight"], x @ w[name].reshape(len(w[name]), -1))
                   for i, name in enumerate(("query", "key", "value")))
        out = np.zeros_like(x)
        for h in range(H):
            g = h // (H // G)
            S = np.zeros((P, N))
            for t in range(T):
                q_t, k_t = (a[t].reshape(G, N)[g] / np.sqrt((a[t].reshape(G, N)[g] ** 2).sum() + 1e-6) for a in (q, k))
                beta = largest_beta * sigmoid(x[t] @ w["write"][:, h])
                alpha = 1.0
                if "A_log" in w:
                    alpha = np.exp(-np.exp(w["A_log"][h]) * softplus(x[t] @ w["step"][:, h] + w["dt_bias"][h]))
                S = S @ (alpha * (np.eye(N) - beta * np.outer(k_t, k_t))) + beta * np.outer(v[t].reshape(H, P)[h], k_t)
                y = rms(S @ q_t / np.sqrt(N)) * w["norm/scale"]
                y = y * silu(x[t] @ w["gate"][:, h]) if "gate" in w else y
                out[t] += y @ w["out"][h]
        return out

    return layer


@pytest.mark.parametrize("config", [
    DeltaNet(2, key_size=3, value_size=4), DeltaNet(1, 2, 4, 3, conv=3, negative=True, form=Chunked(4)),
    GatedDeltaNet(2, key_size=3, value_size=5), GatedDeltaNet(2, 4, 4, 3, negative=True, form=Chunked(4)),
], ids=["plain", "negative", "gated", "gated-value-heads"])
def test_delta_net_is_the_papers(float64, config):
    check(config, reference(2 if config.negative else 1))


def test_published_initialisation():
    p = parameters_of(GatedDeltaNet(64, key_size=2, value_size=4).build(nnx.Rngs(0), Place(16, 0, 4)))
    A, steps = np.exp(p["A_log"][...]), np.log1p(np.exp(np.asarray(p["dt_bias"][...])))
    assert 0.01 <= A.min() and A.max() <= 16 and abs(A.mean() - 8) < 2
    assert 1e-3 * 0.999 < steps.min() and steps.max() < 0.1 * 1.001
    undecayed = {path for path, parameter in p.items() if not parameter.decay}
    assert undecayed == {"A_log", "dt_bias", "norm/scale"}


def test_negative_eigenvalues_flip_a_sign():
    """beta = 2 and a key of length 1: the transition I - 2 k k^T is a reflection; up to 1 it is none."""
    k = np.array([0.6, 0.8])
    assert np.linalg.eigvalsh(np.eye(2) - 2 * np.outer(k, k)).min() == pytest.approx(-1)


def test_errors():
    with pytest.raises(ValueError, match="DeltaNet.value_heads = 3: must be a multiple of heads = 2"):
        DeltaNet(2, 3)
    with pytest.raises(ValueError, match="GatedDeltaNet.key_size = 0"):
        GatedDeltaNet(2, key_size=0)
