"""The MoE layer against a slow loop written from the papers, and the behaviour of its training form."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.experts.balance import LoadLoss, SwitchLoss
from archlab.experts.capacity import Capacity
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place, Training
from archlab.layers.mlp import ClippedSwiGLU
from archlab.layers.repeat import Repeat, Shared
from archlab.layers.residual import Residual
from archlab.training.step import move
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
    x, W = np.asarray(x), {name: np.asarray(getattr(module, name)[...]) for name in ("up", "gate", "down")}
    router, scale_input = np.asarray(module.router.weight[...]), config.scale_input
    k, y, chosen, full = config.router.k, np.zeros(x.shape), np.zeros(E), np.zeros(E)
    importance, square, real = np.zeros(E), 0.0, int((segments > 0).sum())
    for row in range(len(x)):
        taken, room = np.zeros(E, int), math.inf
        if training and config.capacity is not None:
            room = math.ceil(config.capacity.factor * k * (segments[row] > 0).sum() / E)
        for t in range(x.shape[1]):
            if segments[row, t] == 0:
                continue
            logits = x[row, t] @ router
            p = np.exp(logits) / np.exp(logits).sum()
            best = sorted(range(E), key=lambda e: -logits[e])[:k]
            weights = {e: p[e] for e in best}
            if config.router.renormalise:
                weights = {e: p[e] / sum(p[b] for b in best) for e in best}
            importance += p
            square += np.log(np.exp(logits).sum()) ** 2
            for e in best:
                chosen[e] += 1
                if taken[e] >= room:
                    full[e] += 1
                    continue
                taken[e] += 1
                read, give = (weights[e], 1) if scale_input else (1, weights[e])
                gate, up = read * x[row, t] @ W["gate"][e], read * x[row, t] @ W["up"][e]
                y[row, t] += give * ((gate / (1 + np.exp(-gate)) * up) @ W["down"][e])
    balance = E * np.sum(chosen / (k * real) * importance / real)
    return y, {"balance": 0.01 * balance, "router_z": 0.001 * square / real}, chosen, full


@pytest.mark.parametrize("fields", [
    dict(router=TopK(1)), dict(), dict(router=TopK(3, renormalise=True)), dict(router=TopK(2)),
    dict(router=TopK(1), capacity=Capacity(1.0)), dict(capacity=Capacity(0.5)), dict(capacity=Capacity(1.25)),
    dict(scale_input=True), dict(scale_input=True, capacity=Capacity(0.5))], ids=str)
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
    tight = "capacity" in fields and fields["capacity"].factor <= 1
    assert state is None and (full.sum() > 0) == (training is not None and tight)


def test_dropped_share(float64):
    """All tokens want expert 0 of five; a factor of 1 leaves it ceil(12 / 5) = 3 of a row's 12: three quarters drop."""
    _, module = make(router=TopK(1), capacity=Capacity(1.0))
    module.router.weight = module.router.weight.replace(jnp.zeros((D, E)).at[0, 0].set(1.0))
    x = stream().at[..., 0].set(5.0)
    run = jax.jit(lambda training=None: module(x, tokens_of(np.ones((B, T)), training))[::2])
    y, aux = run(TRAINING)
    assert aux.traces["dropped"] == 0.75 and aux.traces["load"].tolist() == [1, 0, 0, 0, 0]
    assert (y[:, 3:] == 0).all() and (jnp.abs(y[:, :3]).sum(-1) > 0).all()
    assert run()[1].traces["dropped"] == 0


def test_padding_changes_nothing(float64):
    """Longer rows and rows of padding alone: the same outputs, losses, traces and gradients, capacity included."""
    _, module = make(capacity=Capacity(0.6, reroute=1, order="priority"))
    x, longer = stream(), np.zeros((B + 1, T + 5), int)
    longer[:B, :T] = SEGMENTS
    padded = jnp.full((B + 1, T + 5, D), 7.0).at[:B, :T].set(x)

    def run(module, x, segments):
        y, _, aux = module(x, tokens_of(segments, TRAINING))
        y = jnp.where(segments[..., None] > 0, y, 0)[:B, :T]
        per_token = [aux.traces.pop(name)[:B, :T] for name in ("choices", "weights", "kept")]
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)) + aux.loss(), (y, per_token, aux)

    step = jax.jit(jax.value_and_grad(run, has_aux=True))
    chex.assert_trees_all_close(step(module, padded, longer), step(module, x, SEGMENTS), rtol=1e-9, atol=1e-12)


def test_jitter_is_for_the_router_in_training_only(float64):
    run = jax.jit(lambda module, x, training=None: module(x, tokens_of(SEGMENTS, training))[::2])
    plain, jittery, x = make()[1], make(router=TopK(2, renormalise=True, jitter=0.5))[1], stream()
    chex.assert_trees_all_equal(run(jittery, x), run(plain, x))
    (y, aux), (other, _) = run(jittery, x, TRAINING), run(jittery, x, Training(jax.random.key(4), jnp.int32(0)))
    assert aux.traces["entropy"] != run(plain, x, TRAINING)[1].traces["entropy"] and not np.allclose(y, other)
    alone = MoE(1, F, router=TopK(1, jitter=0.5)).build(nnx.Rngs(0), Place(D))  # one expert: nothing to be unsure of
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


def test_rows_that_share_their_room(float64):
    """A group of rows is one long sequence to the capacity."""
    config, module = make(router=TopK(1), capacity=Capacity(0.5, rows=3))
    x, segments = stream(), np.ones((B, T))
    y, _, aux = module(x, tokens_of(segments, TRAINING))
    long = MoE(E, F, TopK(1), Capacity(0.5)).build(nnx.Rngs(0), Place(D))
    nnx.update(long, nnx.state(module))
    joined, _, said = long(x.reshape(1, B * T, D), tokens_of(np.ones((1, B * T)), TRAINING))
    np.testing.assert_allclose(y.reshape(joined.shape), joined, rtol=1e-12)
    assert aux.traces["dropped"] == said.traces["dropped"] > 0.3
    with pytest.raises(ValueError, match="Capacity.rows = 3: must divide the 2 rows"):
        module(x[:2], tokens_of(segments[:2], TRAINING))


def test_rerouted_choices_have_the_weight_of_their_new_expert(float64):
    """One expert each after one try; the weight is that of the expert that took the token."""
    config, module = make(router=TopK(1), capacity=Capacity(1.0, reroute=1))
    module.router.weight = module.router.weight.replace(jnp.zeros((D, E)).at[0].set(jnp.array([3.0, 2, 1, 0, 0])))
    x, tokens = jnp.ones((1, 2 * E, D)), tokens_of(np.ones((1, 2 * E)), TRAINING)
    y, _, aux = module(x, tokens)
    probs = jax.nn.softmax(jnp.array([3.0, 2, 1, 0, 0]))
    alone = lambda e: module.weights()._replace(activation="silu")
    hidden = lambda e: jax.nn.silu(jnp.ones(D) @ alone(e).gate[e]) * (jnp.ones(D) @ alone(e).up[e]) @ alone(e).down[e]
    want = [probs[0] * hidden(0)] * 2 + [probs[1] * hidden(1)] * 2 + [0 * hidden(0)] * 6
    np.testing.assert_allclose(y[0], jnp.stack(want), rtol=1e-10)
    assert float(aux.traces["dropped"]) == 0.6


def test_expert_biases_and_clipped_activation(float64):
    """gpt-oss's experts, written out for one token."""
    config, module = make(router=TopK(1), bias=True, activation=ClippedSwiGLU(limit=0.5, alpha=1.5))
    for name in ("up_bias", "gate_bias", "down_bias"):
        weight = getattr(module, name)
        setattr(module, name, weight.replace(jax.random.normal(jax.random.key(4), weight.shape)))
    x = stream()[:1, :1]
    y, _, aux = module(x, tokens_of(np.ones((1, 1))))
    e, w = int(aux.traces["choices"][0, 0, 0]), jax.tree.map(np.asarray, module.weights())
    p = jax.nn.softmax(x[0, 0] @ module.router.weight[...])[e]
    gate, up = (np.asarray(x[0, 0]) @ m[e] + b[e] for m, b in ((w.gate, w.gate_bias), (w.up, w.up_bias)))
    gate, up = np.minimum(gate, 0.5), np.clip(up, -0.5, 0.5)
    want = p * ((gate / (1 + np.exp(-1.5 * gate)) * (up + 1)) @ w.down[e] + w.down_bias[e])
    np.testing.assert_allclose(y[0, 0], want, rtol=1e-10)


def test_the_balance_bias_learns_from_the_load(float64):
    """Steps against a collapsed router: the bias moves by its rate a step and spreads the choices."""
    config, module = make(router=TopK(1, balance_rate=0.02))
    module.router.weight = module.router.weight.replace(module.router.weight[...].at[:, 0].set(0).at[0, 0].set(1.0))
    x, tokens = stream().at[..., 0].add(3.0), tokens_of(SEGMENTS)
    loads = []
    for _ in range(60):
        _, _, aux = module(x, tokens)
        loads.append(float(aux.traces["max_violation"]))
        rest = move({"router/balance": module.router.balance[...]}, aux.updates, {"router/balance": 0.02})
        module.router.balance = module.router.balance.replace(rest["router/balance"])
        np.testing.assert_allclose(aux.updates["router/balance"].sum(), 0, atol=1e-5)
    assert loads[0] > 2 and np.mean(loads[-5:]) < 1
    steps = rest["router/balance"] / 0.02
    np.testing.assert_allclose(steps, jnp.round(steps), atol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_shared_experts_have_one_balance(scan):
    """Weight-tied depth: the copies' loads are summed into the update of the one bias."""
    config = Repeat(Shared(Residual(MoE(E, F, TopK(1, balance_rate=0.1)))), 3, scan)
    _, _, aux = config.build(nnx.Rngs(0), Place(D))(stream(), tokens_of(SEGMENTS, TRAINING))
    (update,) = aux.updates.values()
    (load,) = (value for path, value in aux.traces.items() if path.endswith("/load"))
    chosen = load.sum(0) * (SEGMENTS > 0).sum()
    np.testing.assert_allclose(update, chosen.mean() - chosen, rtol=1e-5)


def test_letters():
    module = MoE(E, F).build(nnx.Rngs(0), Place(D))
    letters = {path: weight.letters for path, weight in parameters_of(module).items()}
    assert letters == {"router/weight": "D->E", "up": "ED->F", "gate": "ED->F", "down": "EF->D"}
    assert abs(float(module.up[...].std()) * D**0.5 - 1) < 0.2  # fan-in is D: the E copies are no part of it


@pytest.mark.parametrize("fields, named", [
    (dict(experts=0), "MoE.experts = 0"),
    (dict(hidden=0), "MoE.hidden = 0"),
    (dict(experts=2, router=TopK(3)), "TopK.k = 3: must be at most the number of experts, 2"),
    (dict(router=2), "MoE.router = 2"),
    (dict(capacity=1.25), "MoE.capacity = 1.25"),
    (dict(balance=(SwitchLoss(), SwitchLoss(0.1))), "MoE.balance = .*the same loss twice"),
    (dict(balance=(LoadLoss(),)), "MoE.balance = .*wants a router with noise"),
    (dict(activation=ClippedSwiGLU(), gated=False), "MoE.activation = .*wants gated=True"),
    (dict(init_scale=0.0), "MoE.init_scale = 0.0"),
    (dict(activation="sulu"), "MoE.activation = 'sulu'.*silu"),
])
def test_bad_fields(fields, named):
    with pytest.raises(ValueError, match=named):
        MoE(**(dict(experts=4, hidden=8) | fields))
