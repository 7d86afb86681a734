"""RG-LRU and its block against a slow float64 loop written from the paper, its initialisations, its root's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.recurrence.rg_lru import RGLRU, bounded_sqrt
from tests.recurrence.against import check, sigmoid, softplus


def gelu(a):
    return 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))


def reference(w, x):
    """Token by token (arXiv:2402.19427, equations 1 to 4 and figure 2); the first skips the root."""
    blocks, K, _ = w["read"].shape
    by_block = lambda u, name: sigmoid(np.concatenate(
        [u[g * K:(g + 1) * K] @ w[name][g] + w[f"{name}_bias"][g] for g in range(blocks)]))
    h, past, y = 0, [], []
    for t, token in enumerate(x):
        past.append(token @ w["into"] + w["into_bias"])
        u = w["conv/bias"] + sum(tap * value for tap, value in zip(w["conv/weight"][::-1], past[::-1]))
        a = np.exp(-softplus(w["decay"])) ** (8 * by_block(u, "forget"))
        b = by_block(u, "read") * u
        h = b if t == 0 else a * h + np.sqrt(1 - a**2) * b
        y.append((gelu(token @ w["gate"] + w["gate_bias"]) * h) @ w["merge"] + w["merge_bias"])
    return np.stack(y)


@pytest.mark.parametrize("config", [RGLRU(2), RGLRU(3, channels=12, conv=2, init="code")], ids=["square", "wide"])
def test_rg_lru_is_the_papers(float64, config):
    check(config, reference)


@pytest.mark.parametrize("init, power", [("paper", 8), ("code", 1)])
def test_decays_at_the_start(init, power):
    p = parameters_of(RGLRU(16, init=init).build(nnx.Rngs(0), Place(1024, 0, 8)))
    a = np.exp(-softplus(np.asarray(p["decay"][...], np.float64))) ** power
    assert 0.9 - 1e-5 < a.min() < 0.901 and 0.998 < a.max() < 0.999 + 1e-5
    middle = np.median(a ** (2 if init == "code" else 1))  # what is uniform: the square in the code
    assert middle == pytest.approx((0.9**2 + 0.999**2) / 2 if init == "code" else (0.9 + 0.999) / 2, abs=0.01)


def test_published_initialisation():
    p = parameters_of(RGLRU(16).build(nnx.Rngs(0), Place(1024, 0, 8)))
    variance = {"into": 1 / 1024, "gate": 1 / 1024, "read": 16 / 1024, "forget": 16 / 1024, "conv/weight": 0.01 / 4,
                "merge": (2 / 4) / 1024}  # 2 / layers, of two branches each
    for path, parameter in p.items():
        if path != "decay":
            assert np.var(parameter[...]) == pytest.approx(variance.get(path, 0), rel=0.1), path
    assert {path for path, parameter in p.items() if parameter.decay} == set(variance)


def test_the_roots_gradient_is_bounded():
    x = jnp.array([0.0, 1e-12, 1e-4, 0.25])
    np.testing.assert_allclose(bounded_sqrt(x), np.sqrt(x))
    np.testing.assert_allclose(jax.vmap(jax.grad(bounded_sqrt))(x), [1000, 1000, 50, 1], rtol=1e-5)


def test_fields_that_do_not_fit():
    with pytest.raises(ValueError, match="RGLRU.blocks = 3: must divide the 16 channels"):
        RGLRU(3, channels=16).check(9)
    with pytest.raises(ValueError, match="RGLRU.init = 'papers': did you mean paper"):
        RGLRU(2, init="papers")
