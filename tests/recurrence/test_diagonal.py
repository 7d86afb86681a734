"""Every form of the diagonal recurrence against a slow float64 loop, with gradients, and what its gradient keeps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.recurrence.diagonal import DiagonalState, diagonal, in_place, sequential
from archlab.recurrence.forms import Associative, Chunked, Form, Kernel, Sequential
from tests.helpers import tokens_of

FORMS = [None, Sequential(), Associative(), Chunked(1), Chunked(4), Chunked(64), Kernel(8, interpret=True)]
CASES = [(form, kind) for form in FORMS for kind in (float, complex)
         if not (isinstance(form, Kernel) and kind is complex)]
SEGMENTS = np.array([[1] * 5 + [2] * 8, [3] * 10 + [0] * 3])
B, T, F = 2, 13, 3


def inputs(kind=float):
    draw = np.random.default_rng(0)
    some = lambda *shape: draw.normal(size=shape) + (1j * draw.normal(size=shape) if kind is complex else 0)
    a, b, h = some(B, T, F), some(B, T, F), some(B, F)
    return a / (np.abs(a) + 0.1), b, h


def loop(a, b, h, segments, last):
    """Token by token; a new document forgets."""
    h, out = h.copy(), np.zeros_like(b)
    for row in range(B):
        for t in range(T):
            if segments[row, t] != 0:
                keep = 0 if segments[row, t] != last[row] else a[row, t]
                h[row], last[row] = keep * h[row] + b[row, t], segments[row, t]
            out[row, t] = h[row]
    return out, h


@pytest.mark.parametrize("form, kind", CASES, ids=str)
def test_forms_are_the_loop(float64, form, kind):
    a, b, h = inputs(kind)
    want, last = loop(a, b, h, SEGMENTS, [1, 1])
    state = DiagonalState(jnp.asarray(h), jnp.array([1, 1]))
    got, after = jax.jit(diagonal, static_argnums=4)(a, b, tokens_of(SEGMENTS), state, form)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(after.hidden, last, rtol=1e-12, atol=1e-12)
    assert after.segment.tolist() == [2, 3]


@pytest.mark.parametrize("form, kind", CASES, ids=str)
def test_forms_have_the_gradients_of_the_steps(float64, form, kind):
    arrays = [jnp.asarray(x) for x in inputs(kind)]

    def loss(form, a, b, h):
        y, state = diagonal(a, b, tokens_of(SEGMENTS), DiagonalState(h, jnp.array([1, 1])), form)
        weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        return (jnp.real(y) * weights).sum() + (jnp.abs(state.hidden) ** 2).sum()

    grad = jax.jit(jax.grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    want, got = (grad(f, *arrays) for f in (Sequential(), form))
    for x, y in zip(got, want):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


def test_one_token_and_pieces_continue_from_the_state(float64):
    a, b, h = (jnp.asarray(x) for x in inputs())
    tokens, state = tokens_of(SEGMENTS), DiagonalState(h, jnp.array([1, 1]))
    run = jax.jit(diagonal)
    want, last = run(a, b, tokens, state)
    outs = []
    for piece in (slice(0, 1), slice(1, 6), slice(6, 7), slice(7, 13)):
        y, state = run(a[:, piece], b[:, piece], tokens_of(SEGMENTS[:, piece]), state)
        outs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), want, rtol=1e-12)
    np.testing.assert_allclose(state.hidden, last.hidden, rtol=1e-12)


def test_kernels_are_for_real_states():
    a, b, h = (jnp.asarray(x) for x in inputs(complex))
    state = DiagonalState(h, jnp.zeros(B, jnp.int32))
    with pytest.raises(ValueError, match=r"complex diagonal states are computed by .* or Chunked\(size\)"):
        diagonal(a, b, tokens_of(SEGMENTS), state, Kernel(8, interpret=True))


def test_errors():
    a, b, h = (jnp.asarray(x) for x in inputs())
    state = DiagonalState(h, jnp.zeros(B, jnp.int32))

    def refused(message, a=a, b=b, state=state, form=None):
        with pytest.raises(ValueError, match=re.escape(message)):
            diagonal(a, b, tokens_of(SEGMENTS), state, form)

    refused("Form(): real diagonal states are computed by Sequential(), Associative(), Chunked(size) or", form=Form())
    refused("form = Kernel(8): needs a GPU or TPU; Kernel(8, interpret=True) for tests", form=Kernel(8))
    refused("a is (2, 3, 13): must be [B, T, F] = (2, 13, 3)", jnp.swapaxes(a, 1, 2))
    refused("b is (2, 3): must be [B, T, F] = (2, 13, 3)", b=b[:, 0])
    refused("state is NoneType: must be [B, F] = (2, F)", state=None)


def test_gradient_keeps_nothing_but_inputs_and_outputs():
    """Temporaries of forward and backward together: what is neither an argument (a, b, the gradient of h) nor a result
    (h, the gradients of a and b)."""
    def temporaries(f, length=2048, channels=32):
        a = jnp.ones((2, length, channels))

        @jax.jit
        def pull(a, b, h, d):
            out, back = jax.vjp(f, a, b, h)
            return out, back((d, d[:, -1]))

        return pull.lower(a, a, a[:, 0], a).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(lambda a, b, h: in_place(a, b, h, 1)) < 0.1 * temporaries(sequential)
