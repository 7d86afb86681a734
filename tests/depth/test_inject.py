"""Input re-injection against loops over its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.depth.halting import ACT
from archlab.depth.inject import Inject
from archlab.depth.recur import Recur
from archlab.layers.contract import Place
from archlab.layers.mlp import MLP
from archlab.layers.sequence import Identity, Provide, Sequence
from archlab.recurrence.min_gru import MinGRU
from tests.helpers import cast, tokens_of

B, T, D = 2, 5, 6


def module(*layers):
    return cast(Sequence(*layers).build(nnx.Rngs(0), Place(D)), jnp.float64)


def stream():
    return jax.random.normal(jax.random.key(1), (B, T, D), jnp.float64)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("how", ["add", "concat"])
def test_every_loop_sees_the_input(float64, how, scan):
    made = module(Provide("input", Identity()), Recur(Sequence(Inject("input", how), MLP(8, "relu")), 3, scan=scan))
    x, (inject, mlp) = np.asarray(stream()), made.layers[1].unit.layers
    h = x
    for _ in range(3):
        h = h + x if how == "add" else np.concatenate([h, x], -1) @ np.asarray(inject.mix[...])
        h = np.maximum(h @ np.asarray(mlp.up[...]), 0) @ np.asarray(mlp.down[...])
    np.testing.assert_allclose(made(stream(), tokens_of(np.ones((B, T))))[0], h, rtol=1e-10, atol=1e-12)


def test_the_input_stays_with_its_token_where_others_halt(float64):
    """A recurrent unit leaves halted tokens out; the input that is read moves up with the tokens that run on."""
    unit = Sequence(Inject("input"), MinGRU())
    made = module(Provide("input", Identity()), Recur(unit, 2, None, ACT(mixture="accumulated"), scan=False))
    recur = made.layers[1]
    recur.halting.halt[...] = jnp.zeros((D, 1)).at[0, 0].set(1.0)
    on = np.arange(T) % 2 == 1
    x = stream().at[:, :, 0].set(jnp.where(on, -1.0, 20.0))
    y = made(x, tokens_of(np.ones((B, T))))[0]
    ones = lambda n: tokens_of(np.ones((B, n)))
    gru = recur.unit.layers[1]
    first = gru(2 * x, ones(T))[0]
    second = gru(first[:, on] + x[:, on], ones(on.sum()))[0]
    p = jax.nn.sigmoid(x[:, on, :1] + 1)
    np.testing.assert_allclose(y[:, ~on], first[:, ~on], rtol=1e-6)  # their share is 1, to the last digits of p
    then = jax.nn.sigmoid(first[:, on, :1] + 1)
    share = jnp.where(p + then > 0.99, 1 - p, then)
    np.testing.assert_allclose(y[:, on], p * first[:, on] + share * second, rtol=1e-9)


def test_weights_and_errors():
    assert Inject("input", "concat").build(nnx.Rngs(0), Place(D)).mix.shape == (2 * D, D)
    assert Inject("input").build(nnx.Rngs(0), Place(D)).mix is None
    with pytest.raises(ValueError, match="Inject.how = 'sum': there are add, concat"):
        Inject("input", "sum")
    x, tokens = jnp.ones((B, T, D)), tokens_of(np.ones((B, T)))
    with pytest.raises(ValueError, match="Inject.name = 'input': nothing is published here"):
        module(Inject("input"))(x, tokens)
    with pytest.raises(ValueError, match="Inject.name = 'inputs': did you mean input?"):
        module(Provide("input", Identity()), Inject("inputs"))(x, tokens)
