"""The door of weight products, where it chooses a form: one token of one row on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.layers import alphabet
from archlab.layers.alphabet import project


@pytest.mark.parametrize("spec, x_shape, shape, pieces", [
    ("BTD,DF->BTF", (1, 1, 16), (16, 6), True),
    ("BTD,DHK->BTHK", (1, 1, 16), (16, 3, 2), True),
    ("BHTK,HKD->BTD", (1, 4, 1, 3), (4, 3, 5), True),
    ("BTD,DF->BTF", (2, 1, 16), (16, 6), False),  # two rows
    ("BTD,DF->BTF", (1, 3, 16), (16, 6), False),  # three tokens
    ("BTD,DF->BTF", (1, 1, 6), (6, 16), False),  # does not divide
    ("BTD,VD->BTV", (1, 1, 16), (6, 16), False),  # summed along the last axis
    ("ECD,EDF->ECF", (2, 1, 16), (2, 16, 6), False),  # a matrix for each expert
])
def test_a_vector_is_multiplied_in_pieces(spec, x_shape, shape, pieces, float64, monkeypatch):
    x = jax.random.normal(jax.random.key(0), x_shape, jnp.float64)
    weight = nnx.Param(jax.random.normal(jax.random.key(1), shape, jnp.float64))
    run = lambda x: project(x, weight, spec)
    in_pieces = lambda: "reduce_sum" in str(jax.make_jaxpr(lambda x: run(x))(x))
    whole, gradient = run(x), jax.grad(lambda x: (run(x) ** 2).sum())(x)
    assert not in_pieces()
    monkeypatch.setattr(alphabet, "LARGE", 1)
    assert in_pieces() == pieces
    np.testing.assert_allclose(run(x), np.einsum(spec, x, weight[...]), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(run(x), whole, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(jax.grad(lambda x: (run(x) ** 2).sum())(x), gradient, rtol=1e-11, atol=1e-11)
