"""Matrix states that decay, in all their forms: against a slow float64 loop, and against the definition's gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.recurrence.channel_decay import channel_decay
from archlab.recurrence.chunks import chunk_length
from archlab.recurrence.forms import Associative, Chunked, Form, Kernel, Sequential
from archlab.recurrence.memory import MemoryState
from archlab.recurrence.scalar_decay import scalar_decay
from tests.helpers import tokens_of

B, H, N, P = 2, 4, 3, 5
KINDS = ["scalar", "scalar, 2 groups", "scalar, 1 group", "channel", "channel, bonus"]


def loop(q, k, v, log_decay, segments, S, last, bonus=None):
    """Token by token. S [B, H, N, P] is of the documents `last` [B]."""
    y, S = np.zeros_like(v), S.copy()
    groups, last = H // q.shape[1], list(last)
    for b, t in np.argwhere(segments > 0):
        if segments[b, t] != last[b]:
            S[b], last[b] = 0, segments[b, t]
        for h in range(H):
            write = np.outer(k[b, h // groups, t], v[b, h, t])
            after = np.exp(log_decay[b, h, t])[..., None] * S[b, h] + write
            read = after if bonus is None else S[b, h] + bonus[h][:, None] * write
            y[b, h, t], S[b, h] = q[b, h // groups, t] @ read, after
    return y, S


def inputs(kind, length, dtype=np.float64, strong=False):
    """q, k, v, log_decay, the state's matrix, and a bonus if there is one; all positive if strong, so that no digits
    are lost but in the decays."""
    rng = np.random.default_rng(length)
    draw = (lambda *shape: rng.uniform(0.5, 1.5, shape)) if strong else (lambda *shape: rng.normal(size=shape))
    G = {"scalar, 2 groups": 2, "scalar, 1 group": 1}.get(kind, H)
    shape = (B, H, length) if kind.startswith("scalar") else (B, H, length, N)
    decay = -rng.exponential(0.3, shape)
    if strong:
        decay = np.where(rng.random(shape) < 0.2, rng.choice([-30, -200, -np.inf], shape), 0.1 * decay)
    arrays = draw(B, G, length, N), draw(B, G, length, N), draw(B, H, length, P), decay, draw(B, H, N, P)
    return [a.astype(dtype) for a in (*arrays, *([draw(H, N)] if "bonus" in kind else []))]


def documents(length):
    """The first row goes on with the state's document, 1; the second begins its own, and ends with padding."""
    marks = np.linspace(0, 4, length, endpoint=False).astype(int)
    first = np.where(np.arange(length) == length // 2, 9, marks + 1)  # a document of one token, too
    return np.stack([first, np.where(np.arange(length) >= max(1, length - length // 5), 0, 7)])


def run(kind, form, segments, q, k, v, log_decay, S, *bonus):
    state = MemoryState(S, jnp.ones((B,), jnp.int32))
    call = scalar_decay if kind.startswith("scalar") else functools.partial(channel_decay, bonus=(*bonus, None)[0])
    y, state = call(q, k, v, log_decay, tokens_of(segments), state, form=form)
    return jnp.where((segments > 0)[:, None, :, None], y, 0), state.matrix


@pytest.mark.parametrize("kind, length", [*((kind, 43) for kind in KINDS), *(
    (kind, length) for kind in ("scalar, 2 groups", "channel", "channel, bonus") for length in (1, 5, 24))])
def test_forms_are_the_loop_and_their_gradients_the_definitions(float64, kind, length):
    """One token, less than a chunk, whole chunks, and chunks and a rest."""
    segments, arrays = documents(length), inputs(kind, length)
    want = loop(*arrays[:4], segments, arrays[4], [1, 1], *arrays[5:])

    def value(form, *arrays):
        y, S = run(kind, form, segments, *arrays)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum() + (S**2).sum(), (y, S)

    @jax.jit
    def everything(*arrays):
        (definition, grads), (chunked, again) = (
            jax.value_and_grad(functools.partial(value, form), range(len(arrays)), has_aux=True)(*arrays)
            for form in (Sequential(), Chunked(12)))
        return (definition[1], chunked[1], run(kind, None, segments, *arrays)), (grads, again)

    values, (grads, again) = everything(*arrays)
    for got in values:
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(again, grads):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 50])
def test_strong_decays_lose_no_digits(kind, size):
    """Decays that leave nothing, among weak ones, in float32: running sums would drown what counts."""
    length = 100
    segments, arrays = documents(length), inputs(kind, length, np.float32, strong=True)
    wide = [a.astype(np.float64) for a in arrays]
    want = loop(*wide[:4], segments, wide[4], [1, 1], *wide[5:])
    for got, exact in zip(jax.jit(functools.partial(run, kind, Chunked(size), segments))(*arrays), want):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-30)

    def gradients(form):
        return jax.jit(jax.grad(lambda *a: run(kind, form, segments, *a)[0].sum(), range(len(arrays))))(*arrays)

    for got, exact in zip(gradients(Chunked(size)), gradients(Sequential())):
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_memory_holds_states_of_chunks_only(kind):
    """The backward pass of a long piece keeps far less than one state a step."""
    length, size = 2048, 32
    shapes = [(1, 2, length, size)] * 3 + [(1, 2, length) if kind == "scalar" else (1, 2, length, size)]
    call = scalar_decay if kind == "scalar" else channel_decay

    def loss(*arrays):
        state = MemoryState.zeros(1, 2, size, size, jnp.float32)
        return call(*arrays, tokens_of(jnp.ones((1, length))), state, form=Chunked(32))[0].sum()

    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.jit(jax.grad(loss, range(4))).lower(*structs).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * 4 * 2 * length * size * size


@pytest.mark.parametrize("length, size, want", [(1, 64, 1), (10, 64, 10), (65, 64, 40), (64, 64, 64), (2049, 64, 64)])
def test_short_pieces_are_hardly_padded(length, size, want):
    assert chunk_length(length, size) == want


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_errors(kind):
    arrays = inputs(kind, 3, np.float32)
    for form in (Associative(), Form(), "chunked"):
        with pytest.raises(ValueError, match=r"form = .*: matrix states are computed by Sequential\(\)"):
            run(kind, form, documents(3), *arrays)
    with pytest.raises(ValueError, match=r"form = Kernel\(8\): needs a GPU or TPU; Kernel\(8, interpret=True\)"):
        run(kind, Kernel(8), documents(3), *arrays)
    wanted = "4 heads do not divide into 3 groups" if kind == "scalar" else r"q is \(2, 3, 3, 3\): must be \[B, H"
    with pytest.raises(ValueError, match=wanted):
        run(kind, None, documents(3), arrays[0][:, :3], arrays[1][:, :3], *arrays[2:])


def test_errors_of_shapes():
    """The first argument that does not fit, by name."""
    q, k, v, g, S = inputs("scalar", 6, np.float32)
    tokens, state = tokens_of(documents(6)), MemoryState(S, jnp.ones((B,), jnp.int32))

    def refused(message, *arrays, state=state, of=scalar_decay, **options):
        with pytest.raises(ValueError, match=re.escape(message)):
            of(*arrays, tokens, state, **options)

    refused("q is (2, 6, 4, 3): must be [B, G, T, N] = (2, G, 6, 3)", *(np.moveaxis(a, 1, 2) for a in (q, k, v, g)))
    refused("v is (2, 6, 4, 5): must be [B, H, T, P] = (2, 4, 6, 5)", q, k, np.moveaxis(v, 1, 2), g)
    refused("k is (2, 2, 6, 3): must be [B, G, T, N] = (2, 4, 6, 3)", q, k[:, :2], v, g)
    refused("log_decay is (2, 4, 6, 3): must be [B, H, T] = (2, 4, 6)", q, k, v, q)
    refused("log_decay is (2, 4, 6): must be [B, H, T, N] = (2, 4, 6, 3)", q, k, v, g, of=channel_decay)
    refused("q is (2, 4, 6, 2): must be [B, G, T, N] = (2, G, 6, 3)", q[..., :2], k[..., :2], v, g)
    refused("state is NoneType: must be [B, H, N, P] = (2, H, N, P)", q, k, v, g, state=None)
    refused("bonus is (3,): must be [H, N] = (4, 3)", q, k, v, q, of=channel_decay, bonus=np.ones(3))
