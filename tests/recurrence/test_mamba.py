"""Mamba against a slow float64 loop written from the paper, its initialisation, and the scan's forms and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.layers.norms import RMSNorm
from archlab.recurrence import selective_scan as scan
from archlab.recurrence.forms import Associative, Chunked, Kernel, Sequential
from archlab.recurrence.mamba import Mamba
from tests.helpers import cast, in_pieces, jittered, tokens_of

D = 8


def reference(w, x, segments):
    """Token by token: convolution, step size, state, gate (arXiv:2312.00752, algorithm 2 and figure 3)."""
    silu = lambda a: a / (1 + np.exp(-a))
    norm = lambda a, i: a if f"norms/{i}/scale" not in w else \
        a / np.sqrt((a**2).mean() + 1e-6) * w[f"norms/{i}/scale"]
    R, N, F = w["step"].shape[0], w["A_log"].shape[1], w["skip"].shape[0]
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        h, past, last = np.zeros((F, N)), [], 0
        for t in range(x.shape[1]):
            if segments[b, t] == 0:
                continue
            if segments[b, t] != last:
                h, past, last = np.zeros((F, N)), [], segments[b, t]
            past.append(x[b, t] @ w["into"])
            recent = past[::-1][: len(w["conv/weight"])]
            u = silu(w["conv/bias"] + sum(w["conv/weight"][-1 - j] * value for j, value in enumerate(recent)))
            dt, B, C = np.split(u @ w["select"], [R, R + N])
            dt, B, C = norm(dt, 0), norm(B, 1), norm(C, 2)
            dt = np.log1p(np.exp(dt @ w["step"] + w["step_bias"]))
            h = np.exp(dt[:, None] * -np.exp(w["A_log"])) * h + (dt * u)[:, None] * B
            y[b, t] = ((h @ C + w["skip"] * u) * silu(x[b, t] @ w["gate"])) @ w["out"]
    return y


@pytest.mark.parametrize("config", [Mamba(state=3), Mamba(state=4, conv=2, expand=3, dt_rank=5, inner_norm=RMSNorm())],
                         ids=["plain", "jamba"])
def test_mamba_is_the_papers(float64, config):
    module = cast(jittered(config.build(nnx.Rngs(0), Place(D))), jnp.float64)
    x = np.random.default_rng(0).normal(size=(2, 14, D))
    segments = np.array([[1] * 5 + [2] * 9, [1] * 11 + [0] * 3])
    w = {path: np.asarray(p[...]) for path, p in parameters_of(module).items()}
    want, real = reference(w, x, segments), segments > 0
    run = functools.partial(jax.jit(lambda m, *args: m(*args)), module)
    y, _, aux = run(jnp.asarray(x), tokens_of(segments))
    np.testing.assert_allclose(np.asarray(y)[real], want[real], rtol=1e-9, atol=1e-12)
    assert (np.asarray(aux.traces["step_size"])[~real] == 0).all()
    state = module.init_state(2, 14, jnp.float64)
    y = in_pieces(run, state, jnp.asarray(x), tokens_of(segments), (2, 1, 11))
    np.testing.assert_allclose(np.asarray(y)[real], want[real], rtol=1e-9, atol=1e-12)


def test_published_initialisation():
    module = Mamba(state=5).build(nnx.Rngs(0), Place(512, 0, 9))
    p = parameters_of(module)
    np.testing.assert_allclose(jnp.exp(p["A_log"][...]), np.tile(np.arange(1, 6), (1024, 1)), rtol=1e-6)
    steps = np.asarray(jax.nn.softplus(p["step_bias"][...]))
    assert 1e-3 * 0.999 < steps.min() and steps.max() < 0.1 * 1.001
    assert abs(np.log(steps).mean() - np.log(1e-2)) < 0.1  # log-uniform
    assert p["step"].shape == (32, 1024) and abs(np.abs(p["step"][...]).max() * 32**0.5 - 1) < 1e-2
    assert abs(np.abs(p["out"][...]).max() * (1024 * 9) ** 0.5 - 1) < 1e-2
    assert (np.asarray(p["skip"][...]) == 1).all()
    undecayed = {path for path, parameter in p.items() if not parameter.decay}
    assert undecayed == {"A_log", "skip", "step_bias", "conv/bias"}


def inputs(length, dtype=jnp.float32, state=4, channels=6, batch=2):
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda i, *shape: jax.random.normal(keys[i], shape, dtype)
    x, dt = normal(0, batch, length, channels), jax.nn.softplus(normal(1, batch, length, channels))
    A, B, C = -jnp.exp(normal(2, channels, state)), normal(3, batch, length, state), normal(4, batch, length, state)
    starts = jnp.zeros((batch, length), bool).at[0, length // 3:length // 3 + 2].set(True)
    dt = dt.at[1, length - length // 4:].set(0)  # padding
    return x, dt, A, B, C, starts, normal(5, batch, channels, state)


def loop(x, dt, A, B, C, starts, h):
    """The recurrence, a step at a time and nothing else: the oracle for values and gradients."""
    def step(h, now):
        x, dt, B, C, start = now
        h = jnp.where(start[:, None, None], 0, h)
        h = jnp.exp(dt[:, :, None] * A) * h + dt[:, :, None] * B[:, None, :] * x[:, :, None]
        return h, (h * C[:, None, :]).sum(-1)

    h, y = jax.lax.scan(step, h, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (x, dt, B, C, starts)))
    return jnp.swapaxes(y, 0, 1), h


PIECES = [(length, None) for length in (1, scan.CHUNK // 3, 2 * scan.CHUNK, 2 * scan.CHUNK + 5)]
FORMS = [(13, form) for form in (Sequential(), Associative(), Chunked(4), Kernel(4, interpret=True))]


@pytest.mark.parametrize("length, form", PIECES + FORMS, ids=str)
def test_scan_equals_the_loop_with_gradients(float64, length, form):
    """Pieces of one step, less than a chunk, whole chunks, and whole chunks and a rest; and each form."""
    args = inputs(length, jnp.float64)
    weigh = lambda y, h: (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum() + (h**2).sum()
    floats = (0, 1, 2, 3, 4, 6)
    runs = [jax.jit(jax.value_and_grad(lambda *a: weigh(*f(*a)), argnums=floats))(*args)
            for f in (loop, functools.partial(scan.selective_scan, form=form))]
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=1e-10)
    assert (runs[1][1][0][1, length - length // 4:] == 0).all()  # the input at padding
    for got, want in zip(runs[1][1], runs[0][1]):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


def test_memory_holds_one_state_a_chunk():
    """The backward pass of a long piece keeps far less than one state a step."""
    length, state, channels = 2048, 16, 32
    args = inputs(length, state=state, channels=channels, batch=1)
    grad = jax.jit(jax.grad(lambda *a: scan.selective_scan(*a)[0].sum(), argnums=(0, 1, 2, 3, 4)))
    temporary = grad.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 0.35 * 4 * length * state * channels
