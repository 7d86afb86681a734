"""Norms, MLPs, heads, the chunked loss and the alphabet, against plain NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import archlab
from archlab.layers import embedding
from archlab.layers.alphabet import inputs, is_matrix, outputs, parameter, parameters_of, project
from archlab.layers.contract import Place, count_positions, document_starts
from archlab.layers.mlp import GeGLU, MLP, SwiGLU
from archlab.layers.norms import LayerNorm, RMSNorm
from tests.helpers import build, jittered, tokens_of

D = 12


def make(config):
    return jittered(config.build(nnx.Rngs(0), Place(D)))


def weights(module):
    return {path: np.asarray(p[...], np.float64) for path, p in parameters_of(module).items()}


def test_norms():
    x = np.random.default_rng(0).normal(size=(2, 3, D)) * 3 + 1
    module = make(RMSNorm())
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights(module)["scale"]
    np.testing.assert_allclose(module(jnp.asarray(x, jnp.float32)), want, rtol=1e-5)
    module = make(LayerNorm())
    w = weights(module)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w["scale"] + w["bias"]
    np.testing.assert_allclose(module(jnp.asarray(x, jnp.float32)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config, act", [
    (MLP(20, bias=True), lambda a: a * 0.5 * (1 + np.vectorize(math.erf)(a / 2**0.5))),
    (MLP(20, activation="relu"), lambda a: np.maximum(a, 0)),
    (MLP(20, activation="relu2"), lambda a: np.maximum(a, 0) ** 2),
    (SwiGLU(20, bias=True), lambda a: a / (1 + np.exp(-a))),
    (GeGLU(20), lambda a: a * 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3)))),
])
def test_mlp(config, act):
    module, x = make(config), np.random.default_rng(0).normal(size=(2, 3, D))
    w = weights(module)
    up = x @ w["up"] + w.get("up_bias", 0)
    hidden = act(x @ w["gate"] + w.get("gate_bias", 0)) * up if config.gated else act(up)
    want = hidden @ w["down"] + w.get("down_bias", 0)
    got = module(jnp.asarray(x, jnp.float32), tokens_of(np.ones((2, 3))))[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_alphabet():
    assert (inputs("LED->F"), outputs("HK->D")) == ("D", "D")
    assert is_matrix("LD->HK") and not is_matrix("L->D") and not is_matrix("V->D") and not is_matrix("L->FN")
    wide_matrix = parameter(nnx.Rngs(0), "ED->HK", (4, 256, 8, 16))
    assert abs(float(wide_matrix[...].std()) * 16 - 1) < 0.02  # fan-in is D alone
    assert wide_matrix.decay and not parameter(nnx.Rngs(0), "->F", (4,)).decay
    with pytest.raises(ValueError, match="name 2 dimensions"):
        parameter(nnx.Rngs(0), "D->F", (4,))
    for letters in ("DF", "D->Q"):
        with pytest.raises(ValueError, match="must be inputs -> outputs"):
            parameter(nnx.Rngs(0), letters, (4, 4))


def test_initialisation_of_a_repeated_model_is_by_fan_in():
    config = archlab.get_config("transformer-tiny")
    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    p = {k: np.asarray(v[...]) for k, v in parameters_of(model).items()}
    assert abs(p["body/unit/layers/0/layer/query"].std() * 128**0.5 - 1) < 0.02
    assert abs(p["body/unit/layers/1/layer/down"].std() * (344 * 12) ** 0.5 - 1) < 0.02  # 12 residual branches
    assert abs(p["embed/table"].std() * 128**0.5 - 1) < 0.02


def test_project_keeps_the_compute_dtype():
    weight = parameter(nnx.Rngs(0), "D->F", (64, 8))
    x = jax.random.normal(jax.random.key(0), (2, 3, 64))
    assert project(x.astype(jnp.bfloat16), weight, "BTD,DF->BTF").dtype == jnp.bfloat16
    np.testing.assert_allclose(project(x, weight, "BTD,DF->BTF"), x @ weight[...], rtol=1e-4, atol=1e-5)


def test_chunked_loss_is_the_loss(monkeypatch):
    model = build(archlab.get_config("transformer-nano", tied=False))
    ids = jax.random.randint(jax.random.key(0), (2, 23), 0, 256)
    hidden = model(ids, logits="none").hidden

    def loss(hidden):
        return model.losses(hidden, ids).sum()

    whole = jax.value_and_grad(loss)(hidden)
    logits = np.asarray(model(ids).logits, np.float64)
    chosen = np.take_along_axis(logits, np.asarray(ids)[..., None], -1)[..., 0]
    np.testing.assert_allclose(whole[0], (np.log(np.exp(logits).sum(-1)) - chosen).sum(), rtol=1e-5)
    monkeypatch.setattr(embedding, "CHUNK_LOGITS", 2 * 256 * 5)  # pieces of 5 tokens, the last one short
    pieces = jax.value_and_grad(loss)(hidden)
    np.testing.assert_allclose(whole[0], pieces[0], rtol=1e-6)
    np.testing.assert_allclose(whole[1], pieces[1], rtol=1e-4, atol=1e-6)
    sizes = {v.aval.size for e in jax.make_jaxpr(jax.grad(loss))(hidden).eqns for v in e.outvars}
    assert max(sizes) < 2 * 23 * 256  # nothing the size of all logits


def test_logits_asked_for():
    model = build(archlab.get_config("transformer-nano"))
    ids = jax.random.randint(jax.random.key(0), (2, 6), 0, 256)
    segments = jnp.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    every = model(ids, segment_ids=segments).logits
    last = model(ids, segment_ids=segments, logits="last").logits
    np.testing.assert_allclose(last[:, 0], jnp.stack([every[0, 5], every[1, 3]]), rtol=1e-5, atol=1e-6)
    assert model(ids, logits="none").logits is None
    with pytest.raises(ValueError, match="logits = 'lst'"):
        model(ids, logits="lst")
    with pytest.raises(ValueError, match="rngs"):
        model(ids, training=True)


def test_positions_continue():
    segments = jnp.array([[0, 5, 5, 0, 5, 7, 7, 0], [2, 2, 2, 2, 2, 2, 3, 3]])
    none = jnp.zeros(2, jnp.int32)
    positions, last, length = count_positions(segments, none, none)
    at_real = lambda positions: jnp.where(segments > 0, positions, -1)
    np.testing.assert_array_equal(at_real(positions), [[-1, 0, 1, -1, 2, 0, 1, -1], [0, 1, 2, 3, 4, 5, 0, 1]])
    first, last1, length1 = count_positions(segments[:, :3], none, none)
    second, last2, length2 = count_positions(segments[:, 3:], last1, length1)
    np.testing.assert_array_equal(at_real(jnp.concatenate([first, second], 1)), at_real(positions))
    np.testing.assert_array_equal((last2, length2), (last, length))
    starts, _ = document_starts(segments, jnp.array([5, 2]))
    np.testing.assert_array_equal(starts, [[0, 0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 0]])
