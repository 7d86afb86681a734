"""Attention against a slow float64 loop written from the paper, and the forms of the core against one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.attention import core
from archlab.attention.attention import Attention
from archlab.attention.qk_norm import QKNorm
from archlab.attention.rules import Rules, Sight
from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.layers.norms import L2Norm, LayerNorm, RMSNorm
from tests.helpers import cast, jittered, tokens_of

D = 16
SEGMENTS = np.array([[1] * 5 + [2] * 9 + [3] * 6, [4] * 17 + [0] * 3])


def reference(config: Attention, w, x, segments, positions):
    """One query at a time: softmax over the keys of its own document that are in sight, and over the head's sink."""
    B, T, _ = x.shape
    H, K = w["query"].shape[1:]
    G = w["key"].shape[1]
    y = np.zeros_like(x)

    def turn(vectors, position):
        if config.positions is None:
            return vectors
        pairs = vectors[:, : K // 2] + 1j * vectors[:, K // 2 :]
        pairs = pairs * np.exp(1j * position * config.positions.base ** (-np.arange(K // 2) / (K // 2)))
        return np.concatenate([pairs.real, pairs.imag], 1)

    def norm(name, vectors):
        if config.qk_norm is None or name == "value":
            return vectors
        kind, axes = config.qk_norm.norm, None if config.qk_norm.over == "all" else 1
        if isinstance(kind, LayerNorm):
            vectors = vectors - vectors.mean(axes, keepdims=True)
        size = (vectors**2).mean(axes, keepdims=True) * (K if isinstance(kind, L2Norm) else 1)
        vectors = vectors / np.sqrt(size + kind.eps) * (w.get(f"{name}_norm/scale", 1) + kind.centred)
        return vectors + w.get(f"{name}_norm/bias", 0)

    def heads(name, b, t):
        """[H or G, K] of one token."""
        vectors = np.einsum("d,dhk->hk", x[b, t], w[name]) + w.get(f"{name}_bias", 0)
        clip = lambda v: v if config.clip is None else np.clip(v, -config.clip, config.clip)
        if name == "value":
            return clip(vectors)
        steps = [lambda v: norm(name, v), clip, lambda v: turn(v, positions[b, t])]
        for step in (steps[1:] + steps[:1]) if config.qk_norm and config.qk_norm.after else steps:
            vectors = step(vectors)
        return vectors

    def sees(b, t, s):
        distance = positions[b, t] - positions[b, s]
        near = config.window is None or abs(distance) < config.window
        same = config.chunk is None or positions[b, t] // config.chunk == positions[b, s] // config.chunk
        return segments[b, s] == segments[b, t] != 0 and (distance >= 0 or not config.causal) and near and same

    for b in range(B):
        q, k, v = (np.stack([heads(name, b, t) for t in range(T)]) for name in ("query", "key", "value"))
        for t in range(T):
            seen = [s for s in range(T) if sees(b, t, s)]
            for h in range(H if seen else 0):
                g = h // (H // G)
                score = k[seen, g] @ q[t, h] * (config.scale or K**-0.5)
                score = np.exp(score if config.cap is None else config.cap * np.tanh(score / config.cap))
                total = score.sum() + (np.exp(w["sinks"][h]) if config.sinks else 0)
                y[b, t] += (score / total) @ v[seen, g] @ w["out"][h]
    return y + w.get("out_bias", 0)


@pytest.mark.parametrize("config", [
    Attention(4), Attention(4, kv_heads=2, bias=True, out_bias=True), Attention(4, kv_heads=1, positions=None),
    Attention(2, window=4), Attention(2, window=1, qk_norm=QKNorm()), Attention(4, head_size=6, window=50),
    Attention(4, kv_heads=2, chunk=4), Attention(2, chunk=6, window=3), Attention(2, sinks=True, window=5),
    Attention(4, cap=0.7, scale=1.3, clip=0.5), Attention(4, 2, causal=False), Attention(2, causal=False, window=3),
    Attention(4, 2, qk_norm=QKNorm(over="all"), chunk=5, sinks=True, cap=2.0),
    Attention(4, 2, qk_norm=QKNorm(over="all"), clip=0.8), Attention(2, qk_norm=QKNorm(after=True), clip=0.5),
    Attention(4, 2, qk_norm=QKNorm(LayerNorm(bias=False), per_head=True)),
    Attention(2, qk_norm=QKNorm(RMSNorm(gain=False), after=True)),
    Attention(4, 2, qk_norm=QKNorm(L2Norm(), per_head=True)),
    Attention(2, qk_norm=QKNorm(RMSNorm(centred=True, eps=0.1))), Attention(2, qk_norm=QKNorm(LayerNorm())),
], ids=str)
def test_attention_is_the_papers(float64, config):
    module = cast(jittered(config.build(nnx.Rngs(0), Place(D))), jnp.float64)
    x = np.random.default_rng(0).normal(size=(2, 20, D))
    tokens = tokens_of(SEGMENTS)
    w = {path: np.asarray(p[...]) for path, p in parameters_of(module).items()}
    want = reference(config, w, x, SEGMENTS, np.asarray(tokens.positions))
    real = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(module(jnp.asarray(x), tokens)[0])[real], want[real], rtol=1e-9, atol=1e-12)
    if not config.causal:
        assert module.init_state(2, 20) is None
        return
    state, outs = module.init_state(2, 20, jnp.float64), []
    for piece in (slice(0, 7), slice(7, 8), slice(8, 20)):
        part = tokens_of(SEGMENTS[:, piece])
        part = type(part)(part.segments, tokens.positions[:, piece])
        y, state, _ = module(jnp.asarray(x)[:, piece], part, state)
        outs.append(y)
    np.testing.assert_allclose(np.concatenate(outs, 1)[real], want[real], rtol=1e-9, atol=1e-12)


@jax.tree_util.register_pytree_node_class
class Tilt:
    """A bias by distance with a weight per head that can be learned."""

    def __init__(self, slopes):
        self.slopes = slopes

    def __call__(self, distance):
        return jnp.sin(self.slopes[None, :, None, None] * distance[:, None])

    def tree_flatten(self):
        return (self.slopes,), None

    tree_unflatten = classmethod(lambda cls, _, children: cls(*children))


@pytest.mark.parametrize("rules", [
    Rules(), Rules(Sight(1)), Rules(Sight(5)), Rules(Sight(16)), Rules(Sight(64)), Rules(Sight(chunk=7)),
    Rules(Sight(causal=False)), Rules(Sight(9, causal=False)), Rules(Sight(chunk=12, causal=False)),
    Rules(Sight(20), scale=0.5, cap=1.5, bias=Tilt(jnp.arange(4.0)), sinks=jnp.arange(4.0)),
    Rules(Sight(causal=False), bias=Tilt(jnp.arange(4.0)), sinks=-jnp.arange(4.0)),
], ids=lambda r: f"{r.sight}{'' if r.sinks is None else '+'}")
@pytest.mark.parametrize("length", [1, 33, 64])
def test_forms_of_the_core_agree_with_gradients(length, rules):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 4, length, 8))
    k, v = (jax.random.normal(key, (2, 2, length, 8)) for key in keys[1:])
    tokens = tokens_of(jnp.stack([jnp.arange(length) // 13 + 1, jnp.where(jnp.arange(length) < length - 3, 1, 0)]))
    places = core.Places(tokens.segments, tokens.positions)
    forms = [lambda q, k, v, r: core.attend_plain(q, k, v, places, places, r),
             lambda q, k, v, r: core.attend(q, k, v, places, r)]
    for ordered, block in ((True, 8), (True, 3), (False, 8)):  # 64 / 3: loops over blocks, and a rest
        forms.append(lambda q, k, v, r, o=ordered, b=block: core.attend_blocks(q, k, v, places, places, r, o, b))
    real = tokens.real[:, None, :, None]
    loss = lambda f: lambda *args: (jnp.where(real, f(*args), 0) ** 2).sum()
    runs = [jax.jit(jax.value_and_grad(loss(f), argnums=(0, 1, 2, 3)))(q, k, v, rules) for f in forms]
    for value, grads in runs[1:]:
        np.testing.assert_allclose(value, runs[0][0], rtol=1e-5)
        for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(runs[0][1]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_no_square_matrix_is_kept():
    """Neither pass of the block form holds T x T scores; the plain one does (so the check can see them)."""
    T = 2048
    q = jnp.ones((1, 1, T, 8))
    tokens = tokens_of(jnp.ones((1, T)))
    places = core.Places(tokens.segments, tokens.positions)

    def temporary(f):
        grad = jax.jit(jax.grad(lambda q: (f(q) ** 2).sum()))
        return grad.lower(q).compile().memory_analysis().temp_size_in_bytes

    assert temporary(lambda q: core.attend_plain(q, q, q, places, places)) > 4 * T * T
    assert temporary(lambda q: core.attend(q, q, q, places)) < 2 * T * T


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
    module = Attention(1, positions=None).build(nnx.Rngs(0), Place(8))
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


@pytest.mark.parametrize("fields, told", [
    ({"heads": 0}, "heads = 0"), ({"heads": 4, "kv_heads": 3}, "kv_heads = 3"),
    ({"heads": 2, "window": 0}, "window = 0"), ({"heads": 2, "chunk": 0}, "chunk = 0"),
    ({"heads": 2, "cap": 0.0}, "cap = 0.0"), ({"heads": 2, "clip": -1.0}, "clip = -1.0"),
    ({"heads": 2, "qk_norm": True}, "qk_norm = True"), ({"heads": 2, "positions": "rope"}, "positions = 'rope'"),
])
def test_bad_fields_are_named(fields, told):
    with pytest.raises(ValueError, match=told):
        Attention(**fields)
