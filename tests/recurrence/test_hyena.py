"""Hyena against a slow float64 loop written from the paper, its filters, its groups of parameters and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.recurrence import long_convolution
from archlab.recurrence.hyena import Hyena
from tests.helpers import cast, in_pieces, jittered, tokens_of

D, T = 4, 22
SEGMENTS = np.array([[1] * 5 + [2] * 10 + [3] * 7, [1] * 19 + [0] * 3])


def taps_of(w, config):
    """The filters [length, order - 1, D] (arXiv:2302.10866, section 3.3 and algorithm 2)."""
    L, taps = config.length, []
    for t in range(L):
        x = np.sin(w["frequency"] * (w["features"][t] @ w["first"] + w["first_bias"]))
        for i in range(config.filter_depth):
            x = np.sin(w["frequency"] * (x @ w[f"inner/{i}"] + w[f"inner_bias/{i}"]))
        window = np.exp(-t / (L - 1) * np.abs(w["deltas"]))
        taps.append(np.einsum("w,wof->of", x, w["last"]) * window)
    return np.array(taps)


def reference(w, config, x, segments):
    """Token by token: products, short convolutions, and gates and sums over all tokens before (algorithm 3)."""
    taps = taps_of({path.removeprefix("filter/"): a for path, a in w.items()}, config)
    y = np.zeros_like(x)
    for b in range(len(x)):
        last = 0
        for t in range(x.shape[1]):
            if segments[b, t] == 0:
                continue
            if segments[b, t] != last:
                last, raw, seen = segments[b, t], [], [[] for _ in range(config.order - 1)]
            raw.append(x[b, t] @ w["into"] + w["into_bias"])
            u = sum(tap * a for tap, a in zip(w["short/weight"][::-1], raw[::-1])) + w["short/bias"]
            *gates, v = np.split(u, config.order + 1)
            for o in range(config.order - 1):
                v = v * gates[config.order - 1 - o]
                seen[o].append(v)
                v = sum(h * a for h, a in zip(taps[:, o], seen[o][::-1])) + w["skip"][o] * v
            y[b, t] = (v * gates[0]) @ w["out"] + w["out_bias"]
    return y


@pytest.mark.parametrize("config", [Hyena(30, filter_width=4, features=3),
                                    Hyena(T, order=3, conv=2, filter_width=3, filter_depth=1, features=5)],
                         ids=["order2", "order3"])
def test_hyena_is_the_papers(float64, monkeypatch, config):
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


def test_filters_as_published():
    """Features of the place, windows from slow to fast, and what is trained how fast."""
    config = Hyena(100, order=3, filter_width=8, features=5)
    filters = config.build(nnx.Rngs(0), Place(6)).filter
    t = np.arange(100)
    waves = [np.exp(-1j * f * 2 * np.pi * t / 100) for f in (1e-4, 1)]
    want = np.stack([t / 99, *(a.real for a in waves), *(a.imag for a in waves)], 1)
    np.testing.assert_allclose(filters.features[...], want, atol=1e-5)
    closed = np.exp(-np.abs(filters.deltas[...]))  # at the end of the text
    np.testing.assert_allclose(closed[0, 0], 1e-2 ** (1 / 1.5), rtol=1e-5)
    np.testing.assert_allclose(closed[1, 5], 1e-2 ** (1 / 0.3), rtol=1e-4)
    assert (np.diff(np.abs(filters.deltas[...]), axis=1) > 0).all()
    np.testing.assert_allclose(filters(40), filters(100)[:40], atol=1e-3)
    rates = {path: p.rate for path, p in parameters_of(filters).items()}
    assert rates.pop("features") == 1e-2 and rates.pop("deltas") == 0 and set(rates.values()) == {1}
    assert not any(p.decay for p in parameters_of(filters).values())


def test_errors():
    for wrong, named in ((dict(order=1), "Hyena.order = 1"), (dict(features=4), "Hyena.features = 4"),
                         (dict(length=0), "Hyena.length = 0"), (dict(frequency=0.0), "Hyena.frequency = 0.0")):
        with pytest.raises(ValueError, match=named):
            Hyena(**wrong)
    module = Hyena(8, filter_width=2, features=3).build(nnx.Rngs(0), Place(2))
    with pytest.raises(ValueError, match="text of 9 tokens is longer than Hyena.length = 8"):
        module(jnp.zeros((1, 9, 2)), tokens_of(np.ones((1, 9))))
    with pytest.raises(ValueError, match="max_length of 9 tokens is longer than Hyena.length = 8"):
        module.init_state(1, 9)
    with pytest.raises(ValueError, match="piece of 5 tokens.*max_length = 4"):
        module(jnp.zeros((1, 5, 2)), tokens_of(np.ones((1, 5))), module.init_state(1, 4))
