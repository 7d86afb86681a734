"""H3 against a slow float64 loop written from the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.recurrence import long_convolution
from archlab.recurrence.h3 import H3
from tests.helpers import cast, in_pieces, jittered, tokens_of

D, T = 4, 22
SEGMENTS = np.array([[1] * 5 + [2] * 10 + [3] * 7, [1] * 19 + [0] * 3])


def reference(w, config, x, segments):
    """Token by token, head by head: shift, outer product, diagonal state space, query (arXiv:2212.14052, section 3.1).
    """
    P, H = config.head_dim, D // config.head_dim
    A, C = -np.exp(w["ssm/A_log"]) + 1j * w["ssm/A_imag"], w["ssm/C"][..., 0] + 1j * w["ssm/C"][..., 1]
    dt = np.exp(w["ssm/log_dt"])[:, None]
    if config.discretisation == "zoh":
        a, scale = np.exp(A * dt), (np.exp(A * dt) - 1) / A
    else:
        a, scale = (1 + dt / 2 * A) / (1 - dt / 2 * A), dt / (1 - dt / 2 * A)
    y = np.zeros_like(x)
    for b in range(len(x)):
        last = 0
        for t in range(x.shape[1]):
            if segments[b, t] == 0:
                continue
            if segments[b, t] != last:
                last, keys, h = segments[b, t], [], np.zeros((H, P, P, A.shape[1]), complex)
            q, k, v = np.einsum("d,dcf->cf", x[b, t], w["into"]) + w["into_bias"]
            keys.append(k)
            k = sum(tap * key for tap, key in zip(w["shift"], keys[::-1])) + w["shift_skip"] * k
            kv = k.reshape(H, P, 1) * v.reshape(H, 1, P)
            h = a[:, None, None] * h + scale[:, None, None] * kv[..., None]
            out = 2 * (C[:, None, None] * h).sum(-1).real + w["skip"][:, None, None] * kv
            y[b, t] = np.einsum("hk,hkv->hv", q.reshape(H, P), out).reshape(D) @ w["out"] + w["out_bias"]
    return y


@pytest.mark.parametrize("config", [H3(4), H3(6, head_dim=2, discretisation="zoh")], ids=["plain", "heads"])
def test_h3_is_the_papers(float64, monkeypatch, config):
    monkeypatch.setattr(long_convolution, "DENSE", 2)  # FFTs from stretches of 8 tokens on
    module = cast(jittered(jax.jit(lambda: config.build(nnx.Rngs(0), Place(D)))()), jnp.float64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, D)))
    w = {path: np.asarray(p[...]) for path, p in parameters_of(module).items()}
    want, real = reference(w, config, np.asarray(x), SEGMENTS), SEGMENTS > 0
    run = jax.jit(lambda x, tokens, state: module(x, tokens, state))
    y, state, _ = run(x, tokens_of(SEGMENTS), None)
    assert state is None
    np.testing.assert_allclose(np.asarray(y)[real], want[real], rtol=1e-9, atol=1e-11)
    y = in_pieces(run, module.init_state(2, T, jnp.float64), x, tokens_of(SEGMENTS), (1, 9, 1, 1, 1, 9))
    np.testing.assert_allclose(np.asarray(y)[real], want[real], rtol=1e-9, atol=1e-11)


def test_published_initialisation():
    """A shift as a convolution's taps, uniform; a diagonal system with the spectrum of S4D-Lin."""
    module = H3(16).build(nnx.Rngs(0), Place(64))
    shift = np.abs(module.shift[...])
    assert shift.shape == (16, 64) and 0.24 < shift.max() <= 0.25 and abs(shift.mean() - 0.125) < 0.01
    np.testing.assert_allclose(module.ssm.A_imag[...], np.tile(np.pi * np.arange(8), (64, 1)), rtol=1e-6)
    slow = {path for path, p in parameters_of(module).items() if p.rate == 0.1}
    assert slow == {"ssm/log_dt", "ssm/A_log", "ssm/A_imag"}


def test_errors():
    with pytest.raises(ValueError, match="H3.head_dim = 3.*width 4"):
        H3(4, head_dim=3).check(4)
    with pytest.raises(ValueError, match="H3.state = 7"):
        H3(7)
