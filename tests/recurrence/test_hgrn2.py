"""HGRN2 against a slow float64 loop written from the paper, and its lower bounds over layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.layers.contract import Place
from archlab.layers.sequence import Sequence
from archlab.recurrence.forms import Chunked
from archlab.recurrence.hgrn2 import BOUNDS, HGRN2, LowerBounds
from tests.helpers import tokens_of
from tests.recurrence.against import D, check, rms, sigmoid, silu


def reference(layer):
    def of(w, x):
        """arXiv:2404.07904, equation 6; the bounds: arXiv:2311.04823, equation 5."""
        logits = w["layers/0/logits"]
        shares = np.exp(logits) / np.exp(logits).sum(0)
        bound = shares[1:layer + 1].sum(0)
        w = {path.removeprefix("layers/1/"): a for path, a in w.items()}
        _, H, K = w["value"].shape
        S, out = np.zeros((H, K, K)), np.zeros_like(x)
        for t, x_t in enumerate(x):
            q, f, v = (np.einsum("d,dhk->hk", x_t, w[name]) for name in ("query", "forget", "value"))
            f = bound.reshape(H, K) + (1 - bound.reshape(H, K)) * sigmoid(f)
            S = f[:, :, None] * S + (1 - f)[:, :, None] * v[:, None, :]
            y = rms(np.einsum("hk,hkp->hp", silu(q), S).ravel() / np.sqrt(K)) * w["norm/scale"]
            out[t] = np.einsum("hk,hkd->d", y.reshape(H, K), w["out"])
        return out

    return of


@pytest.mark.parametrize("layer, form", [(0, None), (2, Chunked(4))])
def test_hgrn2_is_the_papers(float64, layer, form):
    check(Sequence(LowerBounds(), HGRN2(2, form)), reference(layer), Place(D, 2 * layer, 8))


def test_bounds_rise_evenly_at_first():
    _, _, aux = LowerBounds().build(nnx.Rngs(0), Place(3, 0, 8))(jnp.zeros((1, 1, 3)), tokens_of([[1]]))
    np.testing.assert_allclose(aux.provides[BOUNDS], np.tile(np.arange(4)[:, None] / 4, 3), atol=1e-7)


def test_gates_that_are_shut_have_gradients():
    """With the bound 0 of the first layer and gates so far below 0 that f is 0 in float32."""
    module = Sequence(LowerBounds(), HGRN2(1)).build(nnx.Rngs(0), Place(2, 0, 2))
    module.layers[1].forget[...] = jnp.full((2, 1, 2), -500.0)
    tokens = tokens_of([[1, 1, 1]])
    grads = jax.jit(jax.grad(lambda m: m(jnp.ones((1, 3, 2)), tokens)[0].sum(), allow_int=True))(module)
    assert all(a.dtype == jax.dtypes.float0 or np.isfinite(a).all() for a in jax.tree.leaves(grads))


def test_errors():
    with pytest.raises(ValueError, match="HGRN2.heads = 3: must divide the width 8"):
        HGRN2(3).check(8)
    with pytest.raises(ValueError, match="put a LowerBounds layer before"):
        HGRN2(2).build(nnx.Rngs(0), Place(D))(jnp.zeros((1, 1, D)), tokens_of([[1]]))
