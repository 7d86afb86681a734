"""S5 against a slow float64 loop written from the paper, its initialisation and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.recurrence import hippo
from archlab.recurrence.s5 import S5
from tests.helpers import cast, in_pieces, jittered, tokens_of

D = 6
SEGMENTS = np.array([[1] * 5 + [2] * 9, [1] * 11 + [0] * 3])


def reference(w, config, x, segments):
    """Token by token, both modes of each pair (arXiv:2208.04933, section 3; the gate as published with the code)."""
    A = w["A_real"] + 1j * w["A_imag"]
    A = np.minimum(A.real, -1e-4) + 1j * A.imag if config.clip else A
    B, C, dt = w["B"][..., 0] + 1j * w["B"][..., 1], w["C"][:, 0] + 1j * w["C"][:, 1], np.exp(w["log_dt"])
    if config.discretisation == "zoh":
        a, scale = np.exp(A * dt), (np.exp(A * dt) - 1) / A
    else:
        a, scale = (1 + dt / 2 * A) / (1 - dt / 2 * A), dt / (1 - dt / 2 * A)
    y = np.zeros_like(x)
    for b in range(len(x)):
        h, last = np.zeros(len(A), complex), 0
        for t in range(x.shape[1]):
            if segments[b, t] == 0:
                continue
            if segments[b, t] != last:
                h, last = np.zeros(len(A), complex), segments[b, t]
            h = a * h + scale * (x[b, t] @ B)
            u = (h @ C + h.conj() @ C.conj()).real + w["skip"] * x[b, t]
            u = u * (1 + np.tanh((2 / np.pi) ** 0.5 * (u + 0.044715 * u**3))) / 2
            y[b, t] = u / (1 + np.exp(-(u @ w["gate"] + w["gate_bias"])))
    return y


@pytest.mark.parametrize("config", [S5(8, blocks=2), S5(4, discretisation="bilinear", clip=False)],
                         ids=["zoh", "bilinear"])
def test_s5_is_the_papers(float64, config):
    module = cast(jittered(jax.jit(lambda: config.build(nnx.Rngs(0), Place(D)))()), jnp.float64)
    module.A_real[...] = module.A_real[...].at[0].set(1e-3)  # grows, unless it is clipped
    x = np.random.default_rng(0).normal(size=(2, 14, D))
    w = {path: np.asarray(p[...]) for path, p in parameters_of(module).items()}
    want, real = reference(w, config, x, SEGMENTS), SEGMENTS > 0
    run = jax.jit(lambda x, tokens, state: module(x, tokens, state))
    y, state, _ = run(jnp.asarray(x), tokens_of(SEGMENTS), None)
    assert state is None
    np.testing.assert_allclose(np.asarray(y)[real], want[real], rtol=1e-9, atol=1e-12)
    y = in_pieces(run, module.init_state(2, 14, jnp.float64), jnp.asarray(x), tokens_of(SEGMENTS), (2, 1, 11))
    np.testing.assert_allclose(np.asarray(y)[real], want[real], rtol=1e-9, atol=1e-12)


def test_published_initialisation():
    module = S5(64, blocks=4).build(nnx.Rngs(0), Place(128))
    Lambda = hippo.diagonal_plus_low_rank(16)[0]
    np.testing.assert_allclose(module.A_real[...], np.tile(Lambda.real, 4), rtol=1e-6)
    np.testing.assert_allclose(module.A_imag[...], np.tile(Lambda.imag, 4), rtol=1e-6)
    dt = np.exp(module.log_dt[...])
    assert 1e-3 * 0.999 < dt.min() and dt.max() < 0.1 * 1.001 and len(np.unique(dt)) == 32
    # The basis is unitary, and half of the modes are held: what was drawn with variance 1 / P keeps it.
    assert abs((np.asarray(module.B[...]) ** 2).sum(-1).mean() * 64 - 1) < 0.1
    assert abs((np.asarray(module.C[...]) ** 2).sum(1).mean() * 64 - 2) < 0.2  # real and imaginary parts were drawn
    groups = {path: (p.rate, p.decay) for path, p in parameters_of(module).items()}
    assert groups == {"A_real": (0.1, False), "A_imag": (0.1, False), "log_dt": (0.1, False), "B": (0.1, False),
                      "C": (1, True), "skip": (1, True), "gate": (1, True), "gate_bias": (1, False)}


@pytest.mark.parametrize("wrong, named", [(dict(state=6, blocks=2), "S5.blocks = 2"), (dict(blocks=0), "S5.blocks = 0"),
                                          (dict(state=3), "S5.state = 3"), (dict(dt_min=0.0), "S5.dt_min = 0.0")])
def test_errors(wrong, named):
    with pytest.raises(ValueError, match=named):
        S5(**wrong)
