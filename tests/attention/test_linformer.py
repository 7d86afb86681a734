"""Both forms of Linformer against loops from their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.attention.linformer import CausalLinformer, Linformer
from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from tests.helpers import cast, in_pieces, jittered, tokens_of

D, T = 16, 30
SEGMENTS = np.array([[1] * 3 + [2] * 17 + [3] * 1 + [4] * 9, [5] * 26 + [0] * 4])
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


def made(form):
    return cast(jittered(form.build(nnx.Rngs(0), Place(D))), jnp.float64)


def weights_and_heads(module, x):
    w = {path: np.asarray(p[...]) for path, p in parameters_of(module).items()}
    return w, *(np.einsum("BTD,DHK->BTHK", x, w[name]) for name in ("query", "key", "value"))


def attend(q, keys, values):
    score = np.exp(np.array(keys) @ q / len(q) ** 0.5)
    return score / score.sum() @ np.array(values)


def causal_reference(form, module, x, segments, positions):
    w, q, k, v = weights_and_heads(module, x)
    shared, y, c = q.shape[2] // k.shape[2], np.zeros_like(x), form.block
    for b, t in np.argwhere(segments > 0):
        first = t - positions[b, t]  # the document's
        own = first + positions[b, t] // c * c  # the block's
        for h in range(q.shape[2]):
            g = h // shared
            keys, values = list(k[b, own:t + 1, g]), list(v[b, own:t + 1, g])
            for block in range(first, own, c):
                keys += list(w["key_sums"].T @ k[b, block:block + c, g])
                values += list(w["value_sums"].T @ v[b, block:block + c, g])
            y[b, t] += attend(q[b, t, h], keys, values) @ w["out"][h]
    return y


@pytest.mark.parametrize("form", [
    CausalLinformer(4, positions=None, block=3, rank=2),
    CausalLinformer(2, kv_heads=1, positions=None, block=40, rank=5),
    CausalLinformer(2, positions=None, block=1, rank=1), CausalLinformer(2, positions=None, block=8, rank=3),
], ids=str)
def test_causal_linformer_is_its_definition(float64, form):
    module, tokens, real = made(form), tokens_of(SEGMENTS), SEGMENTS > 0
    x = np.random.default_rng(0).normal(size=(2, T, D))
    want = causal_reference(form, module, x, SEGMENTS, np.asarray(tokens.positions))
    run = jax.jit(lambda x, tokens, state=None: module(x, tokens, state))
    close(np.asarray(run(x, tokens)[0])[real], want[real])
    got = in_pieces(run, module.init_state(2, T, jnp.float64), jnp.asarray(x), tokens, (7, 1, 1, 11, 1, 9))
    close(np.asarray(got)[real], want[real])


def test_linformer_is_the_papers(float64):
    """softmax(q (E K)^T / sqrt(K)) F V: a token sees all of the text, and what is behind its end counts for nothing."""
    form = Linformer(4, kv_heads=2, length=40, rank=6)
    module, lengths = made(form), (30, 11)
    x = np.random.default_rng(0).normal(size=(2, T, D))
    segments = np.arange(T) < np.array(lengths)[:, None]
    got = np.asarray(jax.jit(module)(x, tokens_of(segments))[0])
    w, q, k, v = weights_and_heads(module, x)
    for b, n in enumerate(lengths):
        want = sum(np.stack([attend(q[b, t, h], w["key_sums"][:n].T @ k[b, :n, h // 2],
                                    w["value_sums"][:n].T @ v[b, :n, h // 2]) @ w["out"][h] for t in range(n)])
                   for h in range(4))
        close(got[b, :n], want)
        close(got[b, n:], 0)


def test_linformer_sees_both_ways_and_says_so(float64):
    form = Linformer(2, length=T, rank=4)
    assert not form.causal and not form.recurrent and form.longest == T
    module, x, tokens = made(form), jnp.ones((1, T, D)), tokens_of(np.ones((1, T)))
    assert module.init_state(1, T) is None
    changed = module(x.at[0, -1].set(2 * jnp.arange(D)), tokens)[0] - module(x, tokens)[0]
    assert (np.abs(changed[0, 0]) > 1e-6).any()
    assert CausalLinformer(2).causal


def test_linformer_takes_one_document_of_its_length():
    module, x = Linformer(2, length=20, rank=4).build(nnx.Rngs(0), Place(D)), jnp.ones((2, 20, D))
    y = module(x, tokens_of([[1] * 20, [1] * 9 + [2] * 11]))[0]
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()
    with pytest.raises(ValueError, match="Linformer.length = 20: too short for a text of 21"):
        module(jnp.ones((1, 21, D)), tokens_of(np.ones((1, 21))))
    with pytest.raises(ValueError, match="keeps no state"):
        module(x, tokens_of(np.ones((2, 20))), state=())


def test_cache_is_the_sums_and_one_block():
    state = CausalLinformer(2, kv_heads=1, block=8, rank=3).build(nnx.Rngs(0), Place(D)).init_state(2, 70)
    assert state.key_sums.shape == state.value_sums.shape == (2, 8, 3, 1, 8)
    assert state.keys.shape == state.values.shape == (2, 8, 1, 8)


def test_no_square_matrix_is_kept():
    """A block's scores at a time in both passes; all of them would be T x (T / 8 + 64)."""
    length = 4096
    module = CausalLinformer(1, block=64, rank=8).build(nnx.Rngs(0), Place(8))
    loss = lambda x: (module(x, tokens_of(jnp.ones((1, length))))[0] ** 2).sum()
    program = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((1, length, 8), jnp.float32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * length * (length // 8 + 64)


def test_bad_fields_are_named():
    for make, words in [(lambda: Linformer(2, length=4, rank=5), "Linformer.rank = 5"),
                        (lambda: CausalLinformer(2, block=4, rank=0), "CausalLinformer.rank = 0"),
                        (lambda: CausalLinformer(2, block=0), "CausalLinformer.block = 0")]:
        with pytest.raises(ValueError, match=words):
            make()
