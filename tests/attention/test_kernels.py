"""The platforms' kernels, as far as a CPU can tell: splash attention interpreted, and lowered for a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from archlab.attention import kernels
from archlab.attention.core import attend_plain
from archlab.attention.rules import Places, Rules, Sight
from tests.helpers import tokens_of


def inputs(length=256, size=64):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 4, length, size))
    k, v = (jax.random.normal(key, (2, 2, length, size)) for key in keys[1:])
    segments = jnp.stack([jnp.arange(length) // 100 + 1, jnp.where(jnp.arange(length) < length - 30, 1, 0)])
    return q, k, v, tokens_of(segments)


@pytest.mark.parametrize("rules", [Rules(), Rules(Sight(40), scale=0.2, cap=3.0)], ids=["plain", "window"])
def test_splash_is_attention(rules):
    q, k, v, tokens = inputs()
    places = Places(tokens.segments, tokens.positions)
    real = tokens.real[:, None, :, None]
    forms = (lambda q, k, v: attend_plain(q, k, v, places, places, rules),
             lambda q, k, v: kernels.attend_splash(q, k, v, places, rules, interpret=True))
    (want, want_grads), (got, got_grads) = (
        jax.value_and_grad(lambda *a: (jnp.where(real, f(*a), 0) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
        for f in forms)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    for a, b in zip(got_grads, want_grads):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-3)


def test_splash_lowers_for_tpus():
    q, k, v, tokens = inputs(length=512)
    places = Places(tokens.segments, tokens.positions)
    grad = jax.jit(jax.grad(lambda *a: kernels.attend_splash(*a, places, Rules()).sum(), argnums=(0, 1, 2)))
    module = export.export(grad, platforms=["tpu"])(*(a.astype(jnp.bfloat16) for a in (q, k, v))).mlir_module()
    assert module.count("tpu_custom_call") == 3  # forward, the gradient of queries, that of keys and values


@pytest.mark.parametrize("length, size, fits", [(256, 64, True), (200, 64, False), (256, 32, False)])
def test_what_fits_splash(length, size, fits):
    q = jnp.zeros((1, 1, length, size))
    assert kernels.fits_splash(q, Rules(Sight(9), cap=1.0)) == fits
    assert not kernels.fits_splash(q, Rules(Sight(chunk=9))) and not kernels.fits_splash(q, Rules(sinks=jnp.zeros(1)))


def test_what_fits_cudnn():
    def of(dtype, size, rules=Rules(), value_size=None):
        q, v = (jnp.zeros((1, 1, 8, n), dtype) for n in (size, value_size or size))
        return kernels.fits_cudnn(q, v, rules)

    assert of(jnp.bfloat16, 64) and not of(jnp.float32, 64) and not of(jnp.bfloat16, 256) and not of(jnp.float16, 12)
    assert of(jnp.bfloat16, 64, Rules(scale=1.0)) and not of(jnp.bfloat16, 64, Rules(Sight(9)))
    assert of(jnp.bfloat16, 96, value_size=64) and not of(jnp.bfloat16, 64, value_size=96)


def test_values_may_be_smaller_than_keys(monkeypatch):
    """As the kernels are called: splash interpreted, and XLA in the place of cuDNN, which must see equal sizes."""
    q, k, v, tokens = inputs(size=128)
    v, places, real = v[..., :64], Places(tokens.segments, tokens.positions), tokens.real[:, None, :, None]
    want = jnp.where(real, attend_plain(q, k, v, places, places), 0)
    run = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **kw: run(*a, **{**kw, "implementation": "xla"}))
    for got in (kernels.attend_splash(q, k, v, places, Rules(), interpret=True),
                kernels.attend_cudnn(q, k, v, places, Rules())):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
