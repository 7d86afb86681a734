"""Decays from -1 on (arXiv:2411.12537): Mamba's against a slow float64 loop; and parity, which none from 0 on tells.

The weights are given, not learned: what is tested is that the recurrences can, and over how long a text.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from archlab.layers.contract import Place
from archlab.recurrence.delta_rule import delta_rule
from archlab.recurrence.mamba import Mamba
from archlab.recurrence.memory import MemoryState
from archlab.recurrence.selective_scan import selective_scan, signed_scan
from tests.helpers import cast, in_pieces, jittered, tokens_of

BITS = np.random.default_rng(0).integers(0, 2, 300)
PARITY = np.cumsum(BITS) % 2


def test_signed_scan_is_the_loop(float64):
    rng = np.random.default_rng(0)
    x, dt, B, C = rng.normal(size=(2, 9, 3)), rng.uniform(0, 2, (2, 9, 3)), *rng.normal(size=(2, 2, 9, 4))
    A, first = -rng.uniform(0, 2, (3, 4)), rng.normal(size=(2, 3, 4))
    starts = np.zeros((2, 9), bool)
    starts[0, 4] = True
    want = np.zeros_like(x)
    h = first.copy()
    for t in range(9):
        h[starts[:, t]] = 0
        h = (2 * np.exp(dt[:, t, :, None] * A) - 1) * h + (dt * x)[:, t, :, None] * B[:, t, None]
        want[:, t] = (h * C[:, t, None]).sum(-1)
    y, last = jax.jit(signed_scan)(*map(jnp.asarray, (x, dt, A, B, C, starts, first)))
    np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(last, h, rtol=1e-10, atol=1e-12)


def test_mamba_with_signs_continues_from_its_state(float64):
    make = lambda **fields: cast(jittered(Mamba(state=3, **fields).build(nnx.Rngs(0), Place(4))), jnp.float64)
    module, plain = jax.jit(lambda: (make(negative=True), make()))()
    run = jax.jit(lambda x, tokens, state=None: module(x, tokens, state))
    x = jax.random.normal(jax.random.key(0), (2, 11, 4), jnp.float64)
    tokens = tokens_of([[1] * 5 + [2] * 6, [1] * 8 + [0] * 3])
    whole, real = run(x, tokens)[0], np.asarray(tokens.real)
    pieces = in_pieces(run, module.init_state(2, 11, jnp.float64), x, tokens, (4, 1, 6))
    np.testing.assert_allclose(np.asarray(pieces)[real], np.asarray(whole)[real], rtol=1e-10, atol=1e-12)
    assert not np.allclose(jax.jit(lambda: plain(x, tokens)[0])(), whole)


def test_parity_by_signed_scan():
    """A one is a long step, a zero none: the sign of what the first step left is the parity."""
    x = jnp.zeros((1, len(BITS), 1))
    args = x, 40.0 * BITS[None, :, None], -jnp.ones((1, 1)), x, x + 1, jnp.zeros(x.shape[:2], bool), jnp.ones((1, 1, 1))
    y = signed_scan(*args)[0][0, :, 0]
    assert ((y < 0) == PARITY).all() and np.allclose(abs(y), 1)
    assert (selective_scan(*args)[0] >= 0).all()


def test_parity_by_delta_rule():
    """beta = 2 along one key reflects the state there; beta up to 1 can only shrink it."""
    q, zeros = jnp.ones((1, 1, len(BITS), 1)), jnp.zeros((1, 1, len(BITS)))
    start = MemoryState(jnp.ones((1, 1, 1, 1)), jnp.ones((1,), jnp.int32))
    tokens = tokens_of([[1] * len(BITS)])
    read = lambda beta: delta_rule(q, q, 0 * q, jnp.asarray(beta)[None, None], zeros, tokens, start)
    y = read(2.0 * BITS)[0].ravel()
    assert ((y < 0) == PARITY).all() and np.allclose(abs(y), 1)
    assert (read(1.0 * BITS)[0] >= 0).all()
