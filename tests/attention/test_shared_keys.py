"""Attention that goes over a text again with the keys and values of its first pass: kept once, read by any tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.analysis.flops import count
from archlab.attention.attention import Attention
from archlab.attention.blocks import BLOCK
from archlab.attention.latent import LatentAttention
from archlab.attention.positions import ALiBi
from archlab.attention.qk_norm import QKNorm
from archlab.layers.contract import Place
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from tests.helpers import cast, jittered, tokens_of

D = 16
SEGMENTS = np.array([[1] * 5 + [2] * 9 + [3] * 6, [4] * 17 + [0] * 3])
LONG = np.repeat(SEGMENTS, 10, axis=1)
LATENT = LatentAttention(4, rank=8, content_size=4, rotary_size=4, value_size=6)
WINDOW = Attention(4, kv_heads=2, window=4, qk_norm=QKNorm(), bias=True)
CHUNK = Attention(4, kv_heads=1, chunk=6, sinks=True, cap=2.0)
CONFIGS = {"grouped": Attention(4, 2), "window": WINDOW, "chunk": CHUNK, "latent": LATENT,
           "alibi": Attention(2, window=20, positions=ALiBi()), "both ways": Attention(4, 2, causal=False, window=3)}
over = lambda *names: pytest.mark.parametrize("config", [CONFIGS[name] for name in names], ids=names)


def make(config, segments, dtype=jnp.float64):
    """The layer, a text's stream and its tokens."""
    module = cast(jittered(jax.jit(lambda: config.build(nnx.Rngs(0), Place(D)))()), dtype)
    return module, jax.random.normal(jax.random.key(1), (*segments.shape, D), dtype), tokens_of(segments)


def asking(tokens, keys):
    return dataclasses.replace(tokens, keys=keys)


def some(x, tokens, share=3, seed=2):
    """About one of `share` tokens of each row, in order, padding last; and the row's places that they come from."""
    chosen = (np.random.default_rng(seed).random(tokens.segments.shape) < 1 / share) & np.asarray(tokens.real)
    index = np.argsort(~chosen, axis=1, kind="stable")[:, : chosen.sum(1).max() + 1]
    take = lambda a: jnp.take_along_axis(a, index.reshape(index.shape + (1,) * (a.ndim - 2)), 1)
    here = np.take_along_axis(chosen, index, 1)
    assert (~here).any()
    gathered = dataclasses.replace(tokens, segments=jnp.where(here, take(tokens.segments), 0),
                                   positions=take(tokens.positions))
    return take(x), gathered, index, here


@pytest.mark.parametrize("segments", [SEGMENTS, LONG], ids=["short", "long"])
@over(*CONFIGS)
def test_reading_what_was_kept_is_plain_attention(float64, config, segments):
    module, x, tokens = make(config, segments)
    (want, none, _), (y, state, _) = jax.jit(lambda x: (module(x, tokens), module(x, asking(tokens, "keep"))))(x)
    assert none is None
    np.testing.assert_array_equal(y, want)
    real = segments > 0
    again, after, _ = jax.jit(module)(x, asking(tokens, "read"), state)
    np.testing.assert_allclose(again[real], want[real], rtol=1e-9, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    for share in (3, 1.2) if segments is LONG else (3,):  # by all scores at once, and by blocks
        part, gathered, index, here = some(x, tokens, share)
        assert (part.shape[1] > BLOCK) == (share < 2)
        y, after, _ = jax.jit(module)(part, asking(gathered, "read"), state)
        np.testing.assert_allclose(y[here], np.take_along_axis(np.asarray(want), index[:, :, None], 1)[here],
                                   rtol=1e-9, atol=1e-12)
        jax.tree.map(np.testing.assert_array_equal, after, state)


@over("grouped", "latent")
def test_what_is_kept_is_the_state_after_the_piece(float64, config):
    module, x, tokens = make(config, SEGMENTS)
    kept = jax.jit(module)(x, asking(tokens, "keep"))[1]
    want = jax.jit(module)(x, tokens, module.init_state(2, 20, jnp.float64))[1]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), kept) == jax.tree.map(lambda a: (a.shape, a.dtype), want)
    for name in ("positions", "segments", "cursor"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(want, name))
    for stored, wanted in zip(jax.tree.leaves((kept.keys, kept.values)), jax.tree.leaves((want.keys, want.values))):
        real = np.broadcast_to((SEGMENTS > 0)[:, None], stored.shape[:3])
        np.testing.assert_array_equal(stored[real], wanted[real])


@over("window", "chunk", "latent")
@pytest.mark.parametrize("segments", [SEGMENTS, LONG], ids=["short", "long"])
def test_gradients_are_those_of_plain_attention(float64, config, segments):
    """Of a sum over some tokens: by the stream, through queries and through keys, and by the weights."""
    module, x, tokens = make(config, segments)
    _, gathered, index, here = some(x, tokens, 1.2)
    take = lambda a: jnp.take_along_axis(a, index[:, :, None], 1)
    weights = jnp.where(here[:, :, None], jax.random.normal(jax.random.key(5), (*index.shape, D), jnp.float64), 0)

    def plain(module, x):
        return (weights * take(module(x, tokens)[0])).sum()

    def shared(module, x):
        state = module(x, asking(tokens, "keep"))[1]
        return (weights * module(take(x), asking(gathered, "read"), state)[0]).sum()

    got, want = (jax.jit(jax.grad(loss, (0, 1)))(module, x) for loss in (shared, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, want)
    assert all(np.isfinite(leaf).all() and np.any(leaf != 0) for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("scan", [True, False])
def test_a_unit_passes_hollow_states_filled(float64, scan):
    """Where a unit gets None in the place of every cache, it gives back those of the pass."""
    unit = Repeat(Sequence(Residual(Attention(4, 2)), Residual(LATENT)), 2, scan=scan)
    module, x, tokens = make(unit, SEGMENTS)
    hollow = (None, None) if scan else ((None, None), (None, None))
    real = jnp.asarray(SEGMENTS > 0)[:, :, None]

    def loss(module):
        _, state, _ = module(x, asking(tokens, "keep"), hollow)
        y = jnp.where(real, module(x, asking(tokens, "read"), state)[0], 0)
        return (y**2).sum(), (y, state)

    def plain(module):
        y = jnp.where(real, module(x, tokens)[0], 0)
        return (y**2).sum(), y

    got, (y, state) = jax.jit(jax.grad(loss, has_aux=True))(module)
    want, y_want = jax.jit(jax.grad(plain, has_aux=True))(module)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(lambda: module.init_state(2, 20)))
    np.testing.assert_allclose(y, y_want, rtol=1e-9, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), got, want)


@over("grouped", "window", "latent")
def test_a_decode_step_reads_what_the_last_one_wrote(float64, config):
    module, x, tokens = make(config, SEGMENTS)
    want, state = jax.jit(module)(x, tokens)[0], module.init_state(2, 20, jnp.float64)
    step = jax.jit(module)
    for t in range(20):
        now = dataclasses.replace(tokens, segments=tokens.segments[:, t:t + 1], positions=tokens.positions[:, t:t + 1])
        _, state, _ = step(x[:, t:t + 1], now, state)
        y, after, _ = step(x[:, t:t + 1], asking(now, "read"), state)
        real = SEGMENTS[:, t] > 0
        np.testing.assert_allclose(y[real, 0], want[real, t], rtol=1e-9, atol=1e-12)
        jax.tree.map(np.testing.assert_array_equal, after, state)


def test_a_ring_that_lacks_keys_is_no_state_to_read():
    module, x, tokens = make(Attention(4, window=20), LONG, jnp.float32)
    ring = module.init_state(2, 200)
    with pytest.raises(ValueError, match="200 tokens cannot read a ring of 20 slots"):
        module(x, asking(tokens, "read"), ring)
    with pytest.raises(ValueError, match="AttentionModule: Tokens.keys = 'read' needs a state"):
        module(x, asking(tokens, "read"))
    # Of as many tokens as the window, which CONFIGS["alibi"] are read, nothing is lost; nor of fewer.
    jax.eval_shape(module, x[:, :9], asking(tokens_of(SEGMENTS[:, :9]), "read"), module.init_state(2, 19))


@over("grouped", "latent")
def test_reading_projects_no_keys(config):
    """The FLOPs of a read: queries, output, and two products with every slot; no key or value of its own tokens."""
    module, x, tokens = make(config, SEGMENTS, jnp.float32)
    state = jax.eval_shape(module, x, asking(tokens, "keep"))[1]
    read = count(lambda *a: module(*a)[0], x, asking(tokens, "read"), state).matmul
    if config is LATENT:  # every head takes queries to latents, and what it has mixed to values
        each = 4 * (D * 8 + 4 * 8 + 8 * 6 + 6 * D) + 2 * 4 * 20 * 12
    else:
        each = 2 * D * D + 2 * 20 * D
    turning = 2 * 20 * 2 * 2 * 2  # `computed_once`
    assert read == 2 * (2 * 20 * each + turning)
