"""Mamba-2 against a float64 loop written from the paper, and its published initialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.recurrence.mamba2 import Mamba2
from tests.helpers import cast, in_pieces, jittered, tokens_of

D = 6


def silu(x):
    return x / (1 + np.exp(-x))


def reference(config, w, x, segments):
    """A row at a time, a head at a time, a step at a time."""
    F, (G, N), P = config.expand * D, (config.groups, config.state), config.head_size
    H, y = F // P, np.zeros_like(x)
    bias = lambda name: w.get(name, 0)
    for b, t in np.argwhere(segments > 0):
        if t == 0 or segments[b, t] != segments[b, t - 1]:
            S, past = np.zeros((H, N, P)), []
        past.append(x[b, t] @ w["into"] + bias("into_bias"))
        taps = w["conv/weight"][::-1]
        u = silu(bias("conv/bias") + sum(tap * value for tap, value in zip(taps, past[::-1])))
        u, B, C = u[:F].reshape(H, P), u[F:F + G * N].reshape(G, N), u[F + G * N:].reshape(G, N)
        dt = np.log1p(np.exp(x[b, t] @ w["step"] + bias("step_bias") + w["dt_bias"]))
        dt = np.clip(dt, *(config.step_limits or (0, np.inf)))
        out = np.zeros((H, P))
        for h in range(H):
            g = h // (H // G)
            S[h] = np.exp(-dt[h] * np.exp(w["A_log"][h])) * S[h] + dt[h] * np.outer(B[g], u[h])
            out[h] = C[g] @ S[h] + w["skip"][h] * u[h]
        gated = (out.reshape(F) * silu(x[b, t] @ w["gate"] + bias("gate_bias"))).reshape(G, -1)
        normed = gated / np.sqrt((gated**2).mean(-1, keepdims=True) + config.eps) * w["norm/scale"]
        y[b, t] = normed.reshape(F) @ w["out"] + bias("out_bias")
    return y


@pytest.mark.parametrize("config", [
    Mamba2(state=3, head_size=4), Mamba2(state=4, head_size=2, groups=3, conv=2, step_limits=(0.2, 0.9), bias=True,
                                         conv_bias=False, eps=1e-2)], ids=["plain", "all"])
def test_mamba2_is_the_papers(float64, config):
    module = cast(jittered(config.build(nnx.Rngs(0), Place(D)), size=0.3), jnp.float64)
    x = np.random.default_rng(0).normal(size=(2, 14, D))
    segments = np.array([[1] * 5 + [2] * 9, [1] * 11 + [0] * 3])
    w = {path: np.asarray(p[...]) for path, p in parameters_of(module).items()}
    want, real = reference(config, w, x, segments), segments > 0
    run = functools.partial(jax.jit(lambda m, *args: m(*args)), module)
    y, _, aux = run(jnp.asarray(x), tokens_of(segments))
    np.testing.assert_allclose(np.asarray(y)[real], want[real], rtol=1e-9, atol=1e-12)
    assert (np.asarray(aux.traces["step_size"])[~real] == 0).all()
    state = module.init_state(2, 14, jnp.float64)
    y = in_pieces(run, state, jnp.asarray(x), tokens_of(segments), (2, 1, 11))
    np.testing.assert_allclose(np.asarray(y)[real], want[real], rtol=1e-9, atol=1e-12)


def test_published_initialisation():
    p = parameters_of(Mamba2(state=16, head_size=2).build(nnx.Rngs(0), Place(512, 0, 9)))
    rates, steps = np.exp(p["A_log"][...]), np.log1p(np.exp(p["dt_bias"][...]))
    assert 1 <= rates.min() and rates.max() <= 16 and abs(rates.mean() - 8.5) < 0.7
    assert 1e-3 * 0.999 < steps.min() and steps.max() < 0.1 * 1.001
    assert abs(np.log(steps).mean() - np.log(1e-2)) < 0.2  # log-uniform
    assert abs(np.abs(p["out"][...]).max() * (1024 * 9) ** 0.5 - 1) < 1e-2
    assert {path for path, weight in p.items() if not weight.decay} == {"A_log", "skip", "dt_bias", "conv/bias",
                                                                        "norm/scale"}


@pytest.mark.parametrize("fields, why", [(dict(head_size=5), "head_size = 5: must divide expand"),
                                         (dict(head_size=4, groups=2), "groups = 2: must divide the 3 heads"),
                                         (dict(step_limits=(2.0, 1.0)), "step_limits")])
def test_bad_values_are_named(fields, why):
    with pytest.raises(ValueError, match=why):
        Mamba2(**fields).check(D)
