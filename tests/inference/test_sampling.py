"""Sampling: what may be drawn, how often, beside transformers and a slow loop, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.inference.sampling import Sampling, candidates, penalised, sample

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES))[None]


def drawn(n=4000, **settings):
    """The shares of tokens among n draws."""
    keys = jax.random.split(jax.random.key(0), n)
    tokens = jax.vmap(lambda key: sample(LOGITS, key, Sampling(**{"temperature": 1.0, **settings}))[0])(keys)
    return np.bincount(np.asarray(tokens), minlength=5) / n


@pytest.mark.parametrize("settings, share", [
    ({}, PROBABILITIES),
    ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
    ({"top_k": 2}, np.array([0, 0.4, 0, 0.3, 0]) / 0.7),
    ({"top_k": 5}, PROBABILITIES),
    ({"top_p": 1.0}, PROBABILITIES),
    ({"top_p": 0.75}, np.array([0, 0.4, 0, 0.3, 0.15]) / 0.85),  # 0.4 + 0.3 do not reach it, so one more is kept
    ({"top_k": 3, "top_p": 0.8}, np.array([0, 0.4, 0, 0.3, 0]) / 0.7),  # of the three, 0.7 / 0.85 reaches it
    ({"top_p": 1e-6}, np.array([0, 1, 0, 0, 0])),
    ({"min_p": 0.3}, np.array([0, 0.4, 0, 0.3, 0.15]) / 0.85),  # 0.12 and more
    ({"min_p": 0.3, "temperature": 0.5}, np.array([0, 0.16, 0, 0.09, 0]) / 0.25),  # of squares: 0.048 and more
    ({"min_p": 0.0}, PROBABILITIES),
    ({"min_p": 1.0}, np.array([0, 1, 0, 0, 0])),
])
def test_shares(settings, share):
    got = drawn(**settings)
    np.testing.assert_allclose(got, share, atol=0.03)
    assert (got[share == 0] == 0).all()


def filtered(logits, settings):
    """Logits [B, V] with -inf for what may not be drawn."""
    kept, tokens = candidates(jnp.asarray(logits), Sampling(**{"temperature": 1.0, **settings}))
    if tokens is None:
        return np.asarray(kept)
    out = np.full(logits.shape, -np.inf, np.float32)
    np.put_along_axis(out, np.asarray(tokens), np.asarray(kept), 1)
    return out


SETTINGS = [{"temperature": 0.7}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 12, "min_p": 0.1},
            {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.05}, {"top_p": 0.5, "min_p": 0.3}]


def loop(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The filters one after another, each renormalising what it gets, token by token."""
    out = np.full(logits.shape, -np.inf)
    for b, row in enumerate(logits.astype(np.float64) / temperature):
        left = sorted(range(len(row)), key=lambda v: -row[v])[:top_k]
        chances = np.exp(row[left]) / np.exp(row[left]).sum()
        if top_p is not None:
            n = next((n for n in range(1, len(left)) if chances[:n].sum() >= top_p), len(left))
            left, chances = left[:n], chances[:n] / chances[:n].sum()
        for v, chance in zip(left, chances):
            if min_p is None or chance >= min_p * chances[0]:
                out[b, v] = row[v]
    return out


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_are_those_of_a_slow_loop(settings):
    logits = np.random.default_rng(0).normal(0, 2, (16, 50)).astype(np.float32)
    np.testing.assert_allclose(filtered(logits, settings), loop(logits, **settings), rtol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_are_those_of_transformers(settings):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(1).normal(0, 2, (16, 50)).astype(np.float32)
    theirs = torch.from_numpy(logits)
    kinds = {"temperature": "Temperature", "top_k": "TopK", "top_p": "TopP", "min_p": "MinP"}  # in its order
    for name, kind in kinds.items():
        if name in settings:
            theirs = getattr(transformers, f"{kind}LogitsWarper")(settings[name])(None, theirs)
    np.testing.assert_allclose(filtered(logits, settings), theirs.numpy(), rtol=1e-5)


def test_repetition_penalty():
    logits = np.random.default_rng(0).normal(0, 2, (3, 20)).astype(np.float32)
    ids = np.array([[1, 1, 5, 19], [0, 2, 4, 6], [7, 7, 7, 7]])
    seen = np.zeros((3, 20), bool)
    expected = logits.copy()
    for b in range(3):
        for v in set(ids[b].tolist()):
            seen[b, v] = True
            expected[b, v] = logits[b, v] * 1.3 if logits[b, v] < 0 else logits[b, v] / 1.3
    np.testing.assert_allclose(penalised(jnp.asarray(logits), jnp.asarray(seen), 1.3), expected, rtol=1e-6)
    greedy = sample(jnp.asarray(logits), None, Sampling(0, repetition_penalty=9.0), jnp.asarray(seen))
    chosen = np.where(seen, np.where(logits < 0, logits * 9, logits / 9), logits).argmax(-1)
    np.testing.assert_array_equal(greedy, chosen)
    assert (chosen != logits.argmax(-1)).any()
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)(torch.from_numpy(ids), torch.from_numpy(logits))
    np.testing.assert_allclose(expected, theirs.numpy(), rtol=1e-6)


def test_greedy_takes_the_first_of_the_likeliest():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [3.0, 0.0, 0.0, 3.0]])
    for settings in ({"temperature": 0}, {"temperature": None}, {"top_k": 1}, {"temperature": 0, "top_k": 3}):
        np.testing.assert_array_equal(sample(logits, jax.random.key(0), Sampling(**settings)), [1, 0])


def test_rows_are_drawn_apart():
    tokens = sample(jnp.zeros((64, 1000)), jax.random.key(0), Sampling(1.0))
    assert len(np.unique(tokens)) > 50


def test_numbers_are_traced_and_greedy_needs_few():
    structure = lambda **settings: jax.tree.structure(Sampling(**settings).as_arrays())
    assert structure(top_p=0.5, min_p=0.1, repetition_penalty=1.1) == structure(
        temperature=1.5, top_p=0.9, min_p=0.2, repetition_penalty=0.9)
    assert structure(temperature=0, top_k=3, top_p=0.5) == structure(temperature=0)
    assert structure(top_k=3) != structure(top_k=4)


@pytest.mark.parametrize("settings, message", [
    ({"temperature": -0.1}, "temperature = -0.1"), ({"temperature": float("nan")}, "temperature = nan"),
    ({"temperature": float("inf")}, "temperature = inf"), ({"temperature": "hot"}, "temperature = 'hot'"),
    ({"top_k": 0}, "top_k = 0"), ({"top_k": 6}, "top_k = 6.*5"), ({"top_k": 1.5}, "top_k = 1.5"),
    ({"top_p": 0}, "top_p = 0"), ({"top_p": 1.01}, "top_p = 1.01"),
    ({"min_p": -0.1}, "min_p = -0.1"), ({"min_p": 1.5}, "min_p = 1.5"), ({"min_p": float("nan")}, "min_p = nan"),
    ({"repetition_penalty": 0}, "repetition_penalty = 0"), ({"repetition_penalty": -1.0}, "repetition_penalty = -1.0"),
])
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings).check(5)
