"""The MoE layer against a slow loop written from the papers, and the behaviour of its training form."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place, Training
from tests.helpers import cast, tokens_of

D, E, F = 8, 5, 6
B, T = 3, 12
SEGMENTS = np.array([[1] * 12, [1] * 4 + [2] * 5 + [0] * 3, [0] * 12])
TRAINING = Training(jax.random.key(3), jnp.int32(0))


def make(**fields):
    config = MoE(E, F, **fields)
    return config, cast(config.build(nnx.Rngs(0), Place(D)), jnp.float64)


def stream():
    return jax.random.normal(jax.random.key(1), (B, T, D))


def slow(config, module, x, segments, training):
    """Token by token and expert by expert, in NumPy: outputs, losses, and how often each expert was chosen and full."""
    x, W = np.asarray(x), {name: np.asarray(getattr(module, name)[...]) for name in ("router", "up", "gate", "down")}
    k, y, chosen, full = config.router.k, np.zeros(x.shape), np.zeros(E), np.zeros(E)
    importance, square, real = np.zeros(E), 0.0, int((segments > 0).sum())
    for row in range(len(x)):
        taken, room = np.zeros(E, int), math.inf
        if training and config.capacity_factor is not None:
            room = math.ceil(config.capacity_factor * k * (segments[row] > 0).sum() / E)
        for t in range(x.shape[1]):
            if segments[row, t] == 0:
                continue
            logits = x[row, t] @ W["router"]
            p = np.exp(logits) / np.exp(logits).sum()
            best = sorted(range(E), key=lambda e: -logits[e])[:k]
            weights = {e: p[e] for e in best}
            if config.router.renormalise or config.router.softmax == "after":
                weights = {e: p[e] / sum(p[b] for b in best) for e in best}
            importance += p
            square += np.log(np.exp(logits).sum()) ** 2
            for e in best:
                chosen[e] += 1
                if taken[e] >= room:
                    full[e] += 1
                    continue
                taken[e] += 1
                gate, up = x[row, t] @ W["gate"][e], x[row, t] @ W["up"][e]
                y[row, t] += weights[e] * ((gate / (1 + np.exp(-gate)) * up) @ W["down"][e])
    balance = E * np.sum(chosen / (k * real) * importance / real)
    return y, {"balance": config.balance_loss * balance, "router_z": config.z_loss * square / real}, chosen, full


@pytest.mark.parametrize("fields", [
    dict(router=TopK(1)), dict(), dict(router=TopK(3, renormalise=True)), dict(router=TopK(2)),
    dict(router=TopK(1), capacity_factor=1.0), dict(capacity_factor=0.5), dict(capacity_factor=1.25)], ids=str)
@pytest.mark.parametrize("training", [None, TRAINING], ids=["plain", "training"])
def test_against_a_slow_loop(float64, fields, training):
    config, module = make(**fields)
    x = stream()
    y, state, aux = jax.jit(lambda m, x: m(x, tokens_of(SEGMENTS, training)))(module, x)
    want, losses, chosen, full = slow(config, module, x, SEGMENTS, training is not None)
    np.testing.assert_allclose(y, want, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close(aux.losses, losses, rtol=1e-9)
    np.testing.assert_allclose(aux.traces["load"], chosen / chosen.sum(), rtol=1e-9)
    np.testing.assert_allclose(aux.traces["dropped"], full.sum() / chosen.sum(), rtol=1e-9)
    assert state is None and (full.sum() > 0) == (training is not None and fields.get("capacity_factor", 9) <= 1)


def test_dropped_share(float64):
    """All tokens want expert 0 of five; a factor of 1 leaves it ceil(12 / 5) = 3 of a row's 12: three quarters drop."""
    _, module = make(router=TopK(1), capacity_factor=1.0)
    module.router = module.router.replace(jnp.zeros((D, E)).at[0, 0].set(1.0))
    x = stream().at[..., 0].set(5.0)
    run = jax.jit(lambda training=None: module(x, tokens_of(np.ones((B, T)), training))[::2])
    y, aux = run(TRAINING)
    assert aux.traces["dropped"] == 0.75 and aux.traces["load"].tolist() == [1, 0, 0, 0, 0]
    assert (y[:, 3:] == 0).all() and (jnp.abs(y[:, :3]).sum(-1) > 0).all()
    assert run()[1].traces["dropped"] == 0


def test_padding_changes_nothing(float64):
    """Longer rows and rows of padding alone: the same outputs, losses, traces and gradients, capacity included."""
    _, module = make(capacity_factor=0.6)
    x, longer = stream(), np.zeros((B + 1, T + 5), int)
    longer[:B, :T] = SEGMENTS
    padded = jnp.full((B + 1, T + 5, D), 7.0).at[:B, :T].set(x)

    def run(module, x, segments):
        y, _, aux = module(x, tokens_of(segments, TRAINING))
        y = jnp.where(segments[..., None] > 0, y, 0)[:B, :T]
        choices = aux.traces.pop("choices")[:B, :T]
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)) + aux.loss(), (y, choices, aux)

    step = jax.jit(jax.value_and_grad(run, has_aux=True))
    chex.assert_trees_all_close(step(module, padded, longer), step(module, x, SEGMENTS), rtol=1e-9, atol=1e-12)


def test_jitter_is_for_the_router_in_training_only(float64):
    run = jax.jit(lambda module, x, training=None: module(x, tokens_of(SEGMENTS, training))[::2])
    plain, jittery, x = make()[1], make(jitter=0.5)[1], stream()
    chex.assert_trees_all_equal(run(jittery, x), run(plain, x))
    (y, aux), (other, _) = run(jittery, x, TRAINING), run(jittery, x, Training(jax.random.key(4), jnp.int32(0)))
    assert aux.traces["entropy"] != run(plain, x, TRAINING)[1].traces["entropy"] and not np.allclose(y, other)
    alone = MoE(1, F, router=TopK(1), jitter=0.5).build(nnx.Rngs(0), Place(D))  # one expert: nothing to be unsure of
    chex.assert_trees_all_equal(run(alone, x, TRAINING)[0], run(alone, x)[0])


def test_decoding_equals_the_whole(float64):
    """One token at a time, through the form that fetches the chosen experts' weights."""
    _, module = make()
    x, whole = stream(), tokens_of(np.ones((B, T)))
    y = jax.jit(lambda m, x: m(x, whole)[0])(module, x)
    step = jax.jit(lambda m, x: m(x, tokens_of(np.ones((1, 1))))[0])
    got = jnp.stack([jnp.stack([step(module, x[b, t][None, None])[0, 0] for t in range(T)]) for b in range(B)])
    np.testing.assert_allclose(got, y, rtol=1e-10, atol=1e-12)


def test_bfloat16_routes_in_float32():
    module = MoE(E, F).build(nnx.Rngs(0), Place(D))
    x = stream().astype(jnp.bfloat16)
    run = jax.jit(lambda x: module(x, tokens_of(SEGMENTS))[::2])
    y, aux = run(x)
    assert y.dtype == jnp.bfloat16
    assert {value.dtype for value in aux.losses.values()} == {jnp.dtype("float32")}
    exact = run(x.astype(jnp.float32))[1]
    chex.assert_trees_all_close(aux, exact, rtol=1e-6)  # the same router on the same numbers


def test_letters():
    module = MoE(E, F).build(nnx.Rngs(0), Place(D))
    letters = {path: weight.letters for path, weight in parameters_of(module).items()}
    assert letters == {"router": "D->E", "up": "ED->F", "gate": "ED->F", "down": "EF->D"}
    assert abs(float(module.up[...].std()) * D**0.5 - 1) < 0.2  # fan-in is D: the E copies are no part of it


@pytest.mark.parametrize("fields, named", [
    (dict(experts=0), "MoE.experts = 0"),
    (dict(hidden=0), "MoE.hidden = 0"),
    (dict(experts=2, router=TopK(3)), "MoE.router = TopK.k=3.*no more than experts = 2"),
    (dict(capacity_factor=0.0), "MoE.capacity_factor = 0.0"),
    (dict(capacity_factor=-1), "MoE.capacity_factor = -1"),
    (dict(balance_loss=-0.1), "MoE.balance_loss = -0.1"),
    (dict(z_loss=-0.1), "MoE.z_loss = -0.1"),
    (dict(jitter=1.0), "MoE.jitter = 1.0"),
    (dict(activation="sulu"), "MoE.activation = 'sulu'.*silu"),
])
def test_bad_fields(fields, named):
    with pytest.raises(ValueError, match=named):
        MoE(**(dict(experts=4, hidden=8) | fields))
