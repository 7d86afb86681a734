"""A recurrent layer against its definition: the same numbers, whole and in pieces, with documents and padding."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from tests.helpers import cast, in_pieces, jittered, tokens_of

D, SEGMENTS = 8, np.array([[1] * 5 + [2] * 9, [1] * 11 + [0] * 3])


def check(config, reference, at: Place = Place(D), tokens=lambda tokens: tokens, cuts=(6, 1, 7)):
    """Holds the layer of a config, built at a place, to `reference(weights, document) -> y`, which gets the tokens
    [T, D] of one document at a time. tokens: a change to the `Tokens` first. Call it with 64-bit numbers."""
    module = jax.jit(lambda: cast(jittered(config.build(nnx.Rngs(0), at)), jnp.float64))()
    run = jax.jit(lambda x, tokens, state=None: module(x, tokens, state))
    x = np.random.default_rng(0).normal(size=(*SEGMENTS.shape, at.width))
    weights = {path: np.asarray(p[...]) for path, p in parameters_of(module).items()}
    want = np.zeros_like(x)
    for row, segments in enumerate(SEGMENTS):
        for document in set(segments) - {0}:
            want[row, segments == document] = reference(weights, x[row, segments == document])
    known, real = tokens(tokens_of(SEGMENTS)), SEGMENTS > 0
    whole, none, _ = run(jnp.asarray(x), known)
    assert none is None
    state = module.init_state(len(x), x.shape[1], jnp.float64)
    for y in (whole, in_pieces(run, state, jnp.asarray(x), known, cuts)):
        np.testing.assert_allclose(np.asarray(y)[real], want[real], rtol=1e-9, atol=1e-11)


silu = lambda a: a / (1 + np.exp(-a))
sigmoid = lambda a: 1 / (1 + np.exp(-a))
softplus = lambda a: np.log1p(np.exp(a))


def rms(a, eps=1e-6):
    """`a` over its root mean square along the last axis."""
    return a / np.sqrt((a**2).mean(-1, keepdims=True) + eps)
