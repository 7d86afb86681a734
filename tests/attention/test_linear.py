"""Linear attention and Performer against loops from the papers, one query at a time, and against softmax attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.attention.linear import LinearAttention
from archlab.attention.performer import EPSILON, Performer, orthogonal_directions
from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from tests.helpers import cast, in_pieces, jittered, tokens_of

D, T = 16, 30
SEGMENTS = np.array([[1] * 3 + [2] * 17 + [3] * 1 + [4] * 9, [5] * 26 + [0] * 4])


def elu_features(module, x, query):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def random_features(module, x, query):
    """Of one vector; a query's largest exponent is taken off, and no key's (their bound is far below 40 here)."""
    w = np.asarray(module.directions[...])
    x = x / x.shape[-1] ** 0.25
    exponent = w @ x - x @ x / 2
    return (np.exp(exponent - (exponent.max() if query else 0)) + EPSILON) / np.sqrt(len(w))


def reference(module, phi, x, segments):
    """sum_s phi(q_t) . phi(k_s) v_s / sum_s phi(q_t) . phi(k_s), over s <= t of the same document."""
    w = {path: np.asarray(p[...]) for path, p in parameters_of(module).items()}
    heads = lambda name: np.einsum("BTD,DHK->BTHK", x, w[name])
    q, k, v = heads("query"), heads("key"), heads("value")
    shared, y = q.shape[2] // k.shape[2], np.zeros_like(x)
    for b, t in np.argwhere(segments > 0):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        for h in range(q.shape[2]):
            g = h // shared
            weight = np.array([phi(module, q[b, t, h], True) @ phi(module, k[b, s, g], False) for s in seen])
            y[b, t] += weight / weight.sum() @ v[b, seen, g] @ w["out"][h]
    return y


@pytest.mark.parametrize("form, phi", [
    (LinearAttention(4, chunk=4), elu_features), (LinearAttention(2, kv_heads=1), elu_features),
    (Performer(4, positions=None, chunk=5), random_features),
    (Performer(2, kv_heads=1, features=11, positions=None), random_features),
], ids=lambda value: getattr(value, "__name__", str(value)))
def test_linear_attention_is_the_papers(float64, form, phi):
    module = cast(jittered(form.build(nnx.Rngs(0), Place(D))), jnp.float64)
    x, tokens, real = np.random.default_rng(0).normal(size=(2, T, D)), tokens_of(SEGMENTS), SEGMENTS > 0
    want = reference(module, phi, x, SEGMENTS)
    run = jax.jit(lambda x, tokens, state=None: module(x, tokens, state))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    close(np.asarray(run(x, tokens)[0])[real], want[real])
    got = in_pieces(run, module.init_state(2, T, jnp.float64), jnp.asarray(x), tokens, (7, 1, 1, 11, 1, 9))
    close(np.asarray(got)[real], want[real])


def test_state_is_float32_and_free_of_the_length():
    module = LinearAttention(4, kv_heads=2).build(nnx.Rngs(0), Place(D))
    state = module.init_state(3, 10_000, jnp.bfloat16)
    assert state.sums.shape == (3, 2, 4, 4) and state.norms.shape == (3, 2, 4)
    assert state.sums.dtype == state.norms.dtype == jnp.float32
    performer = Performer(4).build(nnx.Rngs(0), Place(64))
    assert performer.init_state(1, 10).sums.shape == (1, 4, int(16 * np.log(16)), 16)


def test_memory_is_linear_in_time():
    """Backward: a number of vectors for each token, and no T x T scores."""
    module = LinearAttention(2).build(nnx.Rngs(0), Place(D))

    def temporary(length):
        loss = lambda x: (module(x, tokens_of(jnp.ones((1, length))))[0] ** 2).sum()
        program = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((1, length, D), jnp.float32)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(8192) - temporary(4096) < 4096 * 160 * D  # 40 vectors of float32 a token


def test_performer_estimates_softmax_attention(float64):
    """With many features phi(q) . phi(k) comes near exp(q . k / sqrt(K)), up to what cancels in the quotient."""
    module = cast(Performer(2, features=20_000).build(nnx.Rngs(0), Place(D)), jnp.float64)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 20, 8), jnp.float64) / 2
    phi_q, phi_k = module.features(q[:, :, None], k)
    got = jnp.einsum("BGRTN,BGSN->BGRTS", phi_q, phi_k)[0, 0, 0]
    want = jax.nn.softmax(q[0, 0] @ k[0, 0].T / 8**0.5)
    assert abs(want - 1 / 20).max() > 0.05
    np.testing.assert_allclose(got / got.sum(1, keepdims=True), want, atol=0.01)


def test_directions_are_orthogonal_with_the_lengths_of_normal_vectors():
    rows = np.asarray(orthogonal_directions(jax.random.key(0), 1000, 16))
    for start in (0, 16, 992):
        block = rows[start:start + 16]
        gram = block @ block.T
        np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-4)
    np.testing.assert_allclose((rows**2).sum(1).mean(), 16, rtol=0.05)
    np.testing.assert_allclose(rows.mean(), 0, atol=0.03)  # without the signs Q's diagonal would not be
    np.testing.assert_allclose(np.mean([np.diag(rows[s:s + 16]).mean() for s in range(0, 992, 16)]), 0, atol=0.1)


def test_nothing_overflows():
    """The worst keys there are: w itself, where the exponent is at its bound |w|^2 / 2; here 128 and more."""
    module = Performer(1, positions=None).build(nnx.Rngs(0), Place(256))
    w = module.directions[...]
    assert (w**2).sum(1).max() / 2 > 100
    k = w[None, None] * 256**0.25
    phi_q, phi_k = module.features(3 * k[:, :, None], k)
    assert np.isfinite(phi_q).all() and np.isfinite(phi_k).all() and phi_k.max() < 1e20


def test_features_are_saved_but_not_trained():
    module = Performer(2).build(nnx.Rngs(0), Place(D))
    assert "directions" not in parameters_of(module)
    other = Performer(2).build(nnx.Rngs(1), Place(D))
    assert not np.allclose(module.directions[...], other.directions[...])
    assert nnx.state(module)["directions"].get_value().shape == (16, 8)


def test_bad_fields_are_named():
    for make, words in [(lambda: LinearAttention(2, chunk=0), "LinearAttention.chunk = 0"),
                        (lambda: Performer(2, features=0), "Performer.features = 0")]:
        with pytest.raises(ValueError, match=words):
            make()
