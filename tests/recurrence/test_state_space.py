"""S4D and S4 against slow float64 loops written from the papers, their initialisation, memory and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.recurrence import hippo
from archlab.recurrence import long_convolution as conv
from archlab.recurrence.s4 import S4
from archlab.recurrence.s4d import S4D
from tests.helpers import cast, jittered, tokens_of

D = 6
T = 22


@pytest.fixture
def short(monkeypatch):
    """FFTs from stretches of 8 tokens on, so that short texts meet them."""
    monkeypatch.setattr(conv, "DENSE", 2)


def convolution(u, h, segments):
    """Tap by tap, within documents."""
    y = np.zeros_like(u)
    for t in range(u.shape[1]):
        for s in range(max(0, t + 1 - len(h)), t + 1):
            y[:, t] += np.where((segments[:, t] == segments[:, s])[:, None], h[t - s] * u[:, s], 0)
    return y


SEGMENTS = np.array([[1] * T, [1] * 5 + [2] * 10 + [3] * (T - 18) + [0] * 3])


@pytest.mark.parametrize("length, taps", [(1, 1), (T, T), (T, 3), (9, 2 * T)])
def test_long_convolution(float64, short, length, taps):
    """By halves for packed rows and at once for one document; fewer taps and more than tokens; gradients."""
    rng = np.random.default_rng(0)
    u, h, segments = rng.normal(size=(2, length, 3)), rng.normal(size=(taps, 3)), SEGMENTS[:, :length]
    for rows in (slice(0, 1), slice(0, 2)):  # a row of one document; with one of several
        want = convolution(u[rows], h, segments[rows])
        real = segments[rows] > 0
        weight = rng.normal(size=want.shape) * real[..., None]

        @jax.jit
        def both(u, h, segments):
            got, pull = jax.vjp(lambda u, h: conv.long_convolution(u, h, segments), u, h)
            return got, *pull(jnp.asarray(weight))

        got, du, dh = both(u[rows], h, segments[rows])
        np.testing.assert_allclose(np.asarray(got)[real], want[real], rtol=1e-10, atol=1e-10)
        # It is linear in each argument: the gradient's product with a change is the change of the weighted sum.
        change, other = rng.normal(size=du.shape) * real[..., None], rng.normal(size=dh.shape)
        np.testing.assert_allclose((du * change).sum(), (weight * convolution(change, h, segments[rows])).sum())
        np.testing.assert_allclose((dh * other).sum(), (weight * convolution(u[rows], other, segments[rows])).sum())


def complex_of(pairs):
    return pairs[..., 0] + 1j * pairs[..., 1]


def discrete(w, config):
    """The dense discretised A [D, N, N] and B [D, N], and C [D, N], of both modes of each pair."""
    both = lambda a: np.concatenate([a, a.conj()], -1)
    A, C = both(-np.exp(w["ssm/A_log"]) + 1j * w["ssm/A_imag"]), both(complex_of(w["ssm/C"]))
    low = both(complex_of(w["ssm/P"])) if "ssm/P" in w else np.zeros_like(A)
    B = both(complex_of(w["ssm/B"])) if "ssm/B" in w else np.ones_like(A)
    As, Bs = [], []
    for a, p, b, dt in zip(A, low, B, np.exp(w["ssm/log_dt"])):
        a, one = np.diag(a) - np.outer(p, p.conj()), np.eye(len(a))
        if getattr(config, "discretisation", "bilinear") == "zoh":
            As.append(np.diag(np.exp(dt * np.diag(a))))
            Bs.append(np.linalg.solve(a, (As[-1] - one) @ b))
        else:
            inverse = np.linalg.inv(one - dt / 2 * a)
            As.append(inverse @ (one + dt / 2 * a))
            Bs.append(inverse @ b * dt)
    return np.array(As), np.array(Bs), C


def reference(w, config, x, segments):
    """Token by token, with dense matrices: S4 (arXiv:2111.00396, section 2), then skip, GELU, product and GLU."""
    A, B, C = discrete(w, config)
    y = np.zeros_like(x)
    for b in range(len(x)):
        h, last = np.zeros(B.shape, complex), 0
        for t in range(x.shape[1]):
            if segments[b, t] == 0:
                continue
            if segments[b, t] != last:
                h, last = np.zeros(B.shape, complex), segments[b, t]
            h = np.einsum("dmn,dn->dm", A, h) + B * x[b, t][:, None]
            out = (C * h).sum(-1)
            np.testing.assert_allclose(out.imag, 0, atol=1e-9)
            out = out.real + w["skip"] * x[b, t]
            out = out * (1 + erf(out / 2**0.5)) / 2
            value, gate = np.einsum("d,dcf->cf", out, w["mix"]) + w["mix_bias"]
            y[b, t] = value / (1 + np.exp(-gate))
    return y


CONFIGS = [S4D(4), S4D(6, init="legs", discretisation="bilinear"), S4(6)]


@pytest.mark.parametrize("config", CONFIGS, ids=["S4D", "S4D-bilinear", "S4"])
def test_layer_is_the_papers(float64, short, config):
    module = cast(jittered(jax.jit(lambda: config.build(nnx.Rngs(0), Place(D)))()), jnp.float64)
    x = np.random.default_rng(0).normal(size=(2, T, D))
    w = {path: np.asarray(p[...]) for path, p in parameters_of(module).items()}
    want, real = reference(w, config, x, SEGMENTS), SEGMENTS > 0
    y, none, _ = jax.jit(lambda m, x: m(x, tokens_of(SEGMENTS)))(module, jnp.asarray(x))
    assert none is None
    np.testing.assert_allclose(np.asarray(y)[real], want[real], rtol=1e-9, atol=1e-11)
    state, outs, at = module.init_state(2, T, jnp.float64), [], 0
    run = jax.jit(lambda m, x, segments, state: m(x, tokens_of(segments), state)[:2])
    for width in (1, 9, 1, 1, 1, 9):  # a document ends within a piece
        y, state = run(module, jnp.asarray(x)[:, at:at + width], SEGMENTS[:, at:at + width], state)
        outs.append(y)
        at += width
    np.testing.assert_allclose(np.concatenate(outs, 1)[real], want[real], rtol=1e-9, atol=1e-11)
    # The state after a piece is that after its steps, where padding came too.
    stepped = module.init_state(2, T, jnp.float64)
    for t in range(T):
        _, stepped = run(module, jnp.asarray(x)[:, t:t + 1], SEGMENTS[:, t:t + 1], stepped)
    np.testing.assert_allclose(state.hidden, stepped.hidden, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(state.segment, stepped.segment)


def test_hippo():
    """LegS written out, taken apart, and put together again."""
    A, B = hippo.legs(4)
    np.testing.assert_allclose(A[3], [-(7**0.5), -(21**0.5), -(35**0.5), -4])
    np.testing.assert_allclose(B, [1, 3**0.5, 5**0.5, 7**0.5])
    for size in (4, 64):
        A, B = hippo.legs(size)
        Lambda, P, Bt, V = hippo.diagonal_plus_low_rank(size)
        half = V @ (np.diag(Lambda) @ V.conj().T)  # the other modes are the conjugates of these
        low = V @ P
        np.testing.assert_allclose(2 * half.real - np.outer(2 * low.real, 2 * low.real), A, atol=1e-8)
        np.testing.assert_allclose(2 * (V @ Bt).real, B, atol=1e-8)
        assert (Lambda.imag > 0).all() and (Lambda.real == -0.5).all()


def test_published_initialisation():
    """Spectra of arXiv:2206.11893, section 4; steps from 1e-3 to 1e-1; learning rates and decay of each parameter."""
    rates = lambda config: {path: (p.rate, p.decay) for path, p in parameters_of(config).items()}
    for config in (S4D(64), S4(64)):
        module = config.build(nnx.Rngs(0), Place(256))
        dt = np.exp(module.ssm.log_dt[...])
        assert 1e-3 * 0.999 < dt.min() and dt.max() < 0.1 * 1.001 and abs(np.log(dt).mean() - np.log(1e-2)) < 0.3
        assert abs(np.asarray(module.ssm.C[...]).var() - 0.5) < 0.02
        for path, (rate, decay) in rates(module).items():
            slow = path in {"ssm/log_dt", "ssm/A_log", "ssm/A_imag", "ssm/P", "ssm/B"}
            assert rate == (0.1 if slow else 1) and decay == (path in {"ssm/C", "skip", "mix"})
    spectrum = lambda init: S4D(8, init=init).build(nnx.Rngs(0), Place(2)).ssm
    normal = hippo.legs(8)[0] + np.outer(*[np.sqrt(np.arange(8) + 0.5)] * 2)
    imaginary = {"lin": np.pi * np.arange(4), "inv": 8 / np.pi * (8 / np.array([1, 3, 5, 7]) - 1), "real": np.zeros(4),
                 "legs": np.sort(np.linalg.eigvals(normal).imag)[4:]}
    for init, want in imaginary.items():
        np.testing.assert_allclose(np.sort(spectrum(init).A_imag[...][0]), np.sort(want), rtol=1e-5, atol=1e-6)
        real = np.arange(1, 5) if init == "real" else 0.5
        np.testing.assert_allclose(np.exp(spectrum(init).A_log[...]), np.broadcast_to(real, (2, 4)), rtol=1e-6)


@pytest.mark.parametrize("config", [S4D(32), S4(16)], ids=["S4D", "S4"])
def test_memory_is_some_copies_of_the_text(config):
    """The backward pass of a long text keeps neither the states of its tokens nor the powers for each."""
    width, length = 32, 4096
    module = config.build(nnx.Rngs(0), Place(width))
    x = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
    grad = jax.jit(jax.grad(lambda m, x: m(x, tokens_of(jnp.ones((1, length))))[0].sum(), argnums=(0, 1)))
    temporary = grad.lower(module, x).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 32 * 4 * length * width < 0.6 * 8 * length * width * config.state * 4


@pytest.mark.parametrize("wrong, named", [(dict(state=5), "S4D.state = 5"), (dict(init="line"), "S4D.init = 'line'"),
                                          (dict(discretisation="euler"), "S4D.discretisation = 'euler'"),
                                          (dict(dt_min=0.2), "S4D.dt_min = 0.2")])
def test_errors(wrong, named):
    with pytest.raises(ValueError, match=named):
        S4D(**wrong)
