"""Attention against a slow float64 loop written from the paper, and the forms of the core against one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.attention import core
from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from tests.helpers import cast, jittered, tokens_of

D = 16
SEGMENTS = np.array([[1] * 5 + [2] * 9 + [3] * 6, [4] * 17 + [0] * 3])


def reference(config: Attention, w, x, segments, positions):
    """One query at a time: softmax over the keys of its own document that lie before it (and within the window)."""
    B, T, _ = x.shape
    H, K = w["query"].shape[1:]
    G = w["key"].shape[1]
    y = np.zeros_like(x)

    def turn(vector, position):
        if config.rotary is None:
            return vector
        pairs = vector[: K // 2] + 1j * vector[K // 2 :]
        pairs = pairs * np.exp(1j * position * config.rotary.base ** (-np.arange(K // 2) / (K // 2)))
        return np.concatenate([pairs.real, pairs.imag])

    def norm(vector, scale):
        return vector if scale is None else vector / np.sqrt((vector**2).mean() + 1e-6) * scale

    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h // (H // G)
                head = lambda name, s, i: x[b, s] @ w[name][:, i] + (w[f"{name}_bias"][i] if config.bias else 0)
                q = turn(norm(head("query", t, h), w.get("query_norm/scale")), positions[b, t])
                seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] != 0
                        and (config.window is None or positions[b, t] - positions[b, s] < config.window)]
                keys = [turn(norm(head("key", s, g), w.get("key_norm/scale")), positions[b, s]) for s in seen]
                if seen:
                    score = np.exp([q @ k / K**0.5 for k in keys])
                    y[b, t] += (score / score.sum()) @ np.stack([head("value", s, g) for s in seen]) @ w["out"][h]
    return y


@pytest.mark.parametrize("config", [
    Attention(4), Attention(4, kv_heads=2, bias=True), Attention(4, kv_heads=1, rotary=None),
    Attention(2, window=4), Attention(2, window=1, qk_norm=True), Attention(4, head_size=6, window=50),
], ids=str)
def test_attention_is_the_papers(float64, config):
    module = cast(jittered(config.build(nnx.Rngs(0), Place(D))), jnp.float64)
    x = np.random.default_rng(0).normal(size=(2, 20, D))
    tokens = tokens_of(SEGMENTS)
    w = {path: np.asarray(p[...]) for path, p in parameters_of(module).items()}
    want = reference(config, w, x, SEGMENTS, np.asarray(tokens.positions))
    real = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(module(jnp.asarray(x), tokens)[0])[real], want[real], rtol=1e-9, atol=1e-12)
    state, outs = module.init_state(2, 20, jnp.float64), []
    for piece in (slice(0, 7), slice(7, 8), slice(8, 20)):
        part = tokens_of(SEGMENTS[:, piece])
        part = type(part)(part.segments, tokens.positions[:, piece])
        y, state, _ = module(jnp.asarray(x)[:, piece], part, state)
        outs.append(y)
    np.testing.assert_allclose(np.concatenate(outs, 1)[real], want[real], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 64])
@pytest.mark.parametrize("length", [1, 33, 64])
def test_forms_of_the_core_agree_with_gradients(length, window):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 4, length, 8))
    k, v = (jax.random.normal(key, (2, 2, length, 8)) for key in keys[1:])
    tokens = tokens_of(jnp.stack([jnp.arange(length) // 13 + 1, jnp.where(jnp.arange(length) < length - 3, 1, 0)]))
    seen = core.visible(tokens.segments, tokens.positions, tokens.segments, tokens.positions, window)
    forms = [lambda *qkv: core.attend_plain(*qkv, seen),
             lambda *qkv: core.attend(*qkv, tokens.segments, tokens.positions, window)]
    places = core.Places(tokens.segments, tokens.positions)
    for ordered, block in ((True, 8), (True, 3), (False, 8)):  # 64 / 3: loops over blocks, and a rest
        forms.append(lambda *qkv, o=ordered, b=block: core.attend_blocks(*qkv, places, places, window, o, b))
    real = tokens.real[:, None, :, None]
    loss = lambda f: lambda *qkv: (jnp.where(real, f(*qkv), 0) ** 2).sum()
    runs = [jax.jit(jax.value_and_grad(loss(f), argnums=(0, 1, 2)))(q, k, v) for f in forms]
    for value, grads in runs[1:]:
        np.testing.assert_allclose(value, runs[0][0], rtol=1e-5)
        for got, want in zip(grads, runs[0][1]):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_no_square_matrix_is_kept():
    """Neither pass of the block form holds T x T scores; the plain one does (so the check can see them)."""
    T = 2048
    q = jnp.ones((1, 1, T, 8))
    tokens = tokens_of(jnp.ones((1, T)))
    seen = core.visible(tokens.segments, tokens.positions, tokens.segments, tokens.positions)

    def temporary(f):
        grad = jax.jit(jax.grad(lambda q: (f(q) ** 2).sum()))
        return grad.lower(q).compile().memory_analysis().temp_size_in_bytes

    assert temporary(lambda q: core.attend_plain(q, q, q, seen)) > 4 * T * T
    assert temporary(lambda q: core.attend(q, q, q, tokens.segments, tokens.positions)) < 2 * T * T


@pytest.mark.parametrize("window", [None, 40, 300])
def test_long_pieces_continue_from_a_state(window):
    """Pieces longer than a block: the first into an empty cache, the second behind it, without T x S scores."""
    T, pieces = 600, ((0, 200), (200, 201), (201, 600))
    module = jittered(Attention(2, window=window).build(nnx.Rngs(0), Place(8)))
    x = jax.random.normal(jax.random.key(0), (2, T, 8))
    tokens = tokens_of(jnp.stack([jnp.arange(T) // 250 + 1, jnp.where(jnp.arange(T) < 580, 1, 0)]))
    want, _, _ = module(x, tokens)
    state, outs = module.init_state(2, T), []
    for start, end in pieces:
        part = jax.tree.map(lambda a: a[:, start:end], tokens)
        y, state, _ = jax.jit(lambda x, part, state: module(x, part, state))(x[:, start:end], part, state)
        outs.append(y)
    got = jnp.concatenate(outs, 1)
    np.testing.assert_allclose(jnp.where(tokens.real[..., None], got - want, 0), 0, atol=2e-5)


def test_prefill_into_a_state_keeps_no_rectangle_of_scores():
    T = 2048
    module = Attention(1, rotary=None).build(nnx.Rngs(0), Place(8))
    prefill = jax.jit(lambda x, state: module(x, tokens_of(jnp.ones((1, T))), state)[:2])
    compiled = prefill.lower(jnp.ones((1, T, 8)), module.init_state(1, T + 64)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * T * T


def test_ring_cache_holds_the_window_and_no_more():
    module = Attention(2, window=6).build(nnx.Rngs(0), Place(D))
    state = module.init_state(3, 1000, jnp.bfloat16)
    assert state.keys.shape == (3, 2, 6, 8) and state.keys.dtype == jnp.bfloat16
    assert module.init_state(3, 4).keys.shape[2] == 4
    x = jnp.ones((3, 10, D))
    segments = jnp.array([[1] * 10, [1] * 4 + [0] * 6, [0] * 10])
    _, state, _ = module(x, tokens_of(segments), state)
    np.testing.assert_array_equal(state.cursor, [10, 4, 0])
    np.testing.assert_array_equal(state.positions[0], [6, 7, 8, 9, 4, 5])  # token t in slot t mod 6
    np.testing.assert_array_equal((state.segments > 0).sum(1), [6, 4, 0])


def test_rotary_depends_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    at = lambda x, p: Rotary().rotate(x, jnp.full((1, 1), p))
    near = (at(q, 5) * at(k, 3)).sum()
    np.testing.assert_allclose((at(q, 105) * at(k, 103)).sum(), near, rtol=1e-4)
    assert abs(float((at(q, 5) * at(k, 4)).sum() - near)) > 1e-3
