"""Mamba-3 against a slow float64 loop written from the paper, its initialisation, its sizes and its errors."""

import numpy as np
import pytest
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.recurrence.forms import Chunked
from archlab.recurrence.mamba3 import Mamba3, heavy_tail
from tests.recurrence.against import check, rms, sigmoid, silu, softplus


def turned(a, angles):
    """Neighbouring channels as complex numbers, the first of them turned."""
    pairs = a[..., 0::2] + 1j * a[..., 1::2]
    pairs[..., : len(angles)] *= np.exp(1j * angles)
    return np.stack([pairs.real, pairs.imag], -1).reshape(a.shape)


def reference(w, x):
    """Token by token, the write of the token before included (arXiv:2603.15569, equations 4, 8 and 12)."""
    (H, R, N), (_, _, P), (_, G, _, _) = w["key_bias"].shape, w["into"].shape, w["key"].shape
    out = np.zeros_like(x)
    w = {"angle": np.zeros((len(w["into"]), 0)), **w}
    for h in range(H):
        S, angle = np.zeros((N, P)), np.zeros(w["angle"].shape[1])
        K_before, V_before = np.zeros((R, N)), np.zeros((R, P))
        for t, x_t in enumerate(x):
            dt, mix = softplus(x_t @ w["step"][:, h] + w["dt_bias"][h]), sigmoid(x_t @ w["mix"][:, h])
            rate = x_t @ w["rate"][:, h]
            a = np.exp(-dt * (1 + rate if rate >= 0 else 1 / (1 - rate)))
            angle = angle + np.pi * np.tanh(x_t @ w["angle"]) * dt
            K, Q = (turned(rms(np.einsum("d,drn->rn", x_t, w[name][:, h // (H // G)]), 1e-5) * w[f"{name}_norm/scale"]
                           + w[f"{name}_bias"][h], angle) for name in ("key", "query"))
            V = w.get("spread", np.ones((H, R, P)))[h] * (x_t @ w["into"][:, h])
            S = a * S + (1 - mix) * dt * a * K_before.T @ V_before + mix * dt * K.T @ V
            gate = w.get("spread_gate", np.ones((H, R, P)))[h] * (x_t @ w["gate"][:, h])
            Y = (Q @ S + w["skip"][h] * V) * silu(gate) * w.get("gather", np.ones((H, R, P)))[h]
            out[t] += Y.sum(0) @ w["out"][h]
            K_before, V_before = K, V
    return out


@pytest.mark.parametrize("config", [
    Mamba3(state=6, head_size=4), Mamba3(state=6, head_size=4, groups=2, rotated=0.8, form=Chunked(4)),
    Mamba3(state=4, head_size=8, mimo_rank=3, rotated=1.0),
    Mamba3(state=4, head_size=8, mimo_rank=2, rotated=0, form=Chunked(4)),
], ids=["siso", "groups", "mimo", "real-mimo"])
def test_mamba3_is_the_papers(float64, config):
    check(config, reference)


def test_published_initialisation():
    module = Mamba3(state=8, mimo_rank=4).build(nnx.Rngs(0), Place(512, 0, 4))
    p = parameters_of(module)
    assert p["key"].shape == (512, 1, 4, 8) and p["angle"].shape == (512, 2)
    for name in ("key_bias", "query_bias", "skip", "spread_gate"):
        assert (np.asarray(p[name][...]) == 1).all()
    for name in ("spread", "gather"):
        assert (np.asarray(p[name][...]) == 0.25).all()
    steps = softplus(np.asarray(p["dt_bias"][...]))
    assert 1e-3 * 0.999 < steps.min() and steps.max() < 0.1 * 1.001
    assert np.abs(p["into"][...]).max() == pytest.approx(512**-0.5, rel=0.01)
    undecayed = {path for path, parameter in p.items() if not parameter.decay}
    assert undecayed == {"key_norm/scale", "query_norm/scale", "key_bias", "query_bias", "dt_bias", "skip"}


def test_rates():
    np.testing.assert_allclose(heavy_tail(np.array([-1e6, -1, 0, 3])), [1e-4, 0.5, 1, 4], rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="Mamba3.head_size = 64: must divide expand"):
        Mamba3().check(24)
    with pytest.raises(ValueError, match="Mamba3.groups = 3: must divide the 4 heads"):
        Mamba3(head_size=12, groups=3).check(24)
    with pytest.raises(ValueError, match="Mamba3.rotated = 2"):
        Mamba3(rotated=2)
