"""Sparse attention against a dense mask written from the definitions, one query at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.analysis.flops import count
from archlab.attention.positions import ALiBi
from archlab.attention.sparse import BigBird, Longformer
from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from tests.helpers import cast, in_pieces, jittered, tokens_of

D, T = 16, 30
SEGMENTS = np.array([[1] * 3 + [2] * 17 + [3] * 1 + [4] * 9, [5] * 26 + [0] * 4])
FORMS = [
    Longformer(4, window=5, globals=2), Longformer(2, kv_heads=1, window=1, globals=0, positions=None),
    Longformer(2, window=50, globals=3), BigBird(4, block=3, window=2, globals=1, random=2, kv_heads=2),
    BigBird(2, block=1, window=1, globals=0, random=3, seed=5), BigBird(2, block=4, window=2, globals=1, random=0),
    BigBird(2, block=2, window=1, globals=2, random=1),
]


def sees(form, drawn, query, key):
    """Whether the token at place `query` sees that at `key`, by the text of the config."""
    if key > query:
        return False
    if isinstance(form, Longformer):
        return key < form.globals or query - key < form.window
    query, key = query // form.block, key // form.block
    return key < form.globals or query - key < form.window or key in drawn(query)


def reference(form, module, x, positions):
    """softmax over the keys of its own document that a token sees, all else left out."""
    w = {path: np.asarray(p[...]) for path, p in parameters_of(module).items()}
    drawn = functools.cache(lambda n: set(np.asarray(form.draw(jnp.int32(n), module.layer[...])).tolist()))
    heads = lambda name: np.einsum("BTD,DHK->BTHK", x, w[name])
    q, k, v = heads("query"), heads("key"), heads("value")
    K, shared = q.shape[-1], q.shape[2] // k.shape[2]

    def turned(a, position):
        if form.positions is None:
            return a
        pairs = (a[..., : K // 2] + 1j * a[..., K // 2 :]) * np.exp(1j * position * 1e4 ** (-np.arange(K // 2) * 2 / K))
        return np.concatenate([pairs.real, pairs.imag], -1)

    y = np.zeros_like(x)
    for b, t in np.argwhere(SEGMENTS > 0):
        seen = [s for s in range(T) if SEGMENTS[b, s] == SEGMENTS[b, t]
                and sees(form, drawn, positions[b, t], positions[b, s])]
        for h in range(q.shape[2]):
            g = h // shared
            score = [turned(q[b, t, h], positions[b, t]) @ turned(k[b, s, g], positions[b, s]) / K**0.5 for s in seen]
            y[b, t] += np.exp(score) / np.exp(score).sum() @ v[b, seen, g] @ w["out"][h]
    return y


def made(form, index=1, width=D):
    return jittered(form.build(nnx.Rngs(0), Place(width, index)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_sparse_attention_is_its_definition(float64, form):
    module, tokens, real = cast(made(form), jnp.float64), tokens_of(SEGMENTS), SEGMENTS > 0
    x = np.random.default_rng(0).normal(size=(2, T, D))
    want = reference(form, module, x, np.asarray(tokens.positions))
    run = jax.jit(lambda x, tokens, state=None: module(x, tokens, state))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    close(np.asarray(run(x, tokens)[0])[real], want[real])
    got = in_pieces(run, module.init_state(2, T, jnp.float64), jnp.asarray(x), tokens, (7, 1, 1, 11, 1, 9))
    close(np.asarray(got)[real], want[real])


@pytest.mark.parametrize("form", FORMS[::3], ids=str)
def test_gradient_is_that_of_the_dense_mask(float64, form):
    module, tokens, real = cast(made(form), jnp.float64), tokens_of(SEGMENTS), jnp.asarray(SEGMENTS > 0)[..., None]
    drawn = functools.cache(lambda n: set(np.asarray(form.draw(jnp.int32(n), module.layer[...])).tolist()))
    p = np.asarray(tokens.positions)
    mask = np.array([[[SEGMENTS[b, s] == SEGMENTS[b, t] > 0 and sees(form, drawn, p[b, t], p[b, s])
                       for s in range(T)] for t in range(T)] for b in range(2)])

    def dense(module, x):
        q, k, v = module.heads(x, tokens)
        k, v = (jnp.repeat(a, q.shape[1] // a.shape[1], 1) for a in (k, v))
        scores = jnp.where(mask[:, None], jnp.einsum("BHTK,BHSK->BHTS", q, k) * q.shape[-1] ** -0.5, -1e30)
        return jnp.einsum("BHTS,BHSK,HKD->BTD", jax.nn.softmax(scores), v, module.out[...])

    x = jax.random.normal(jax.random.key(0), (2, T, D), jnp.float64)
    loss = lambda run: lambda module, x: jnp.where(real, run(module, x) ** 3, 0).sum()
    grads = [jax.jit(jax.grad(loss(run), (0, 1), allow_int=True))(module, x)
             for run in (dense, lambda module, x: module(x, tokens)[0])]
    for want, got in zip(*map(jax.tree.leaves, grads)):
        if got.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_random_blocks():
    """Distinct, between the global ones and the window, all of them where there are few; every one as likely."""
    form = BigBird(2, block=1, window=3, globals=2, random=3)
    draw = jax.jit(jax.vmap(form.draw, (0, None)))
    blocks = jnp.arange(400)
    drawn = np.asarray(draw(blocks, jnp.array([4])))
    for n, row in zip(blocks.tolist(), drawn):
        between = range(form.globals, n - form.window + 1)
        chosen = row[row >= 0].tolist()
        assert set(chosen) <= set(between) and len(set(chosen)) == len(chosen) == min(3, len(between))
    assert (drawn != draw(blocks, jnp.array([5]))).any()
    other = BigBird(2, block=1, window=3, globals=2, random=3, seed=1)
    assert (drawn != jax.vmap(other.draw, (0, None))(blocks, jnp.array([4]))).any()
    many = np.asarray(jax.vmap(lambda layer: form.draw(jnp.int32(14), layer[None]))(jnp.arange(3000)))
    share = np.bincount(many.ravel(), minlength=12)[2:12] / len(many)  # ten to choose from
    np.testing.assert_allclose(share, 0.3, atol=0.04)  # four standard deviations


def test_cache_is_a_ring_where_nothing_is_drawn():
    shape = lambda form: made(form).init_state(2, 1000).keys.shape
    assert shape(Longformer(2, window=6, globals=3)) == (2, 9, 2, 8)
    assert shape(BigBird(2, block=4, window=2, globals=1, random=0)) == (2, 12, 2, 8)
    assert shape(BigBird(2, block=4, window=2, globals=1, random=1)) == (2, 1000, 2, 8)


@pytest.mark.parametrize("form", [Longformer(2, window=64, globals=8), BigBird(2, block=16)], ids=str)
def test_work_and_memory_are_linear_in_time(form):
    """Operations as counted; memory as allocated: a number of vectors a token, so no copies of keys for each block."""
    module = made(form)

    def cost(length, run):
        return count(run, jax.ShapeDtypeStruct((1, length, D), jnp.float32)).matmul

    forward = lambda x: (module(x, tokens_of(jnp.ones(x.shape[:2])))[0] ** 2).sum()
    for run in (forward, jax.grad(forward)):
        assert cost(4096, run) == pytest.approx(4 * cost(1024, run), rel=0.06)  # one block more, of 16 or 64

    def temporary(length):
        program = jax.jit(jax.grad(forward)).lower(jax.ShapeDtypeStruct((1, length, D), jnp.float32)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(8192) - temporary(4096) < 4096 * 80 * D  # 20 vectors of float32 a token


def test_a_step_reads_only_what_it_sees():
    form = BigBird(2, block=16, positions=None)
    module = made(form)
    keys = (3 + 2 + 3) * 16
    for length in (1024, 4096):
        state = jax.eval_shape(lambda: module.init_state(1, length))
        step = lambda x, state: module(x, tokens_of(jnp.ones((1, 1))), state)[:2]
        cost = count(step, jax.ShapeDtypeStruct((1, 1, D), jnp.float32), state)
        assert cost.matmul == 4 * 2 * D * D + 2 * 2 * keys * D
        assert cost.elementwise < 100 * keys


def test_bad_fields_are_named():
    for make, words in [(lambda: Longformer(2, window=0), "Longformer.window = 0"),
                        (lambda: Longformer(0), "heads = 0"),
                        (lambda: BigBird(2, random=-1), "BigBird.random = -1"),
                        (lambda: BigBird(2, block=0), "BigBird.block = 0"),
                        (lambda: BigBird(3, kv_heads=2), "kv_heads = 2"),
                        (lambda: BigBird(3).check(16), "heads = 3")]:
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(ValueError, match="BigBird.positions = ALiBi"):
        BigBird(2, positions=ALiBi())


def test_places_are_counted_among_the_tokens_that_come():
    """Behind a router positions have gaps; the pattern is over the tokens that are there."""
    module = made(BigBird(2, block=2, window=1, globals=1, random=1, positions=None))
    tokens, x = tokens_of(SEGMENTS), jax.random.normal(jax.random.key(0), (2, T, D))
    gaps = type(tokens)(tokens.segments, 3 * tokens.positions + 1)
    run = jax.jit(lambda x, tokens, state=None: module(x, tokens, state))
    np.testing.assert_array_equal(run(x, gaps)[0], run(x, tokens)[0])
    got = in_pieces(run, module.init_state(2, T), x, gaps, (7, 1, 22))
    np.testing.assert_allclose(np.where(SEGMENTS[..., None] > 0, got - run(x, tokens)[0], 0), 0, atol=1e-5)
