"""Routers in stages, against a loop over tokens and stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.experts.mixture_of_routers import MixtureOfRouters
from archlab.experts.moe import MoE
from archlab.experts.sampled import Reinforce, log_chance
from archlab.layers.contract import Place, Training
from tests.helpers import cast, jittered, tokens_of

D, E = 6, 8
SEGMENTS = np.array([[1] * 9, [1] * 3 + [2] * 2 + [0] * 4])
TRAINING = Training(jax.random.key(3), jnp.int32(0))


def make(*stages, **fields):
    config = MixtureOfRouters(stages, **fields)
    return jittered(cast(config.build(nnx.Rngs(0), Place(D), E, 1.0), jnp.float64), size=0.5)


def run(module, training=None):
    x = jax.random.normal(jax.random.key(1), (2, 9, D))
    return x, jax.jit(lambda m, x: m(x, tokens_of(SEGMENTS, training)))(module, x)


@pytest.mark.parametrize("stages, skip", [((6, 4, 2), True), ((8, 1), False), ((2,), True)])
def test_against_a_slow_loop(float64, stages, skip):
    module = make(*stages, balance=0.5, skip=skip, price=0.25 * skip)
    x, routing = run(module)
    embedding, real = np.asarray(module.embedding[...]), int((SEGMENTS > 0).sum())
    hits, mass, entropy = (np.zeros((len(stages), E)) for _ in range(3))
    gates, skipped = 0.0, 0
    for b, t in zip(*np.nonzero(SEGMENTS)):
        token, logits, left = np.asarray(x[b, t]), np.zeros(E), list(range(E))
        read = token
        for s, keep in enumerate(stages):
            logits += read @ np.asarray(module.weight[s][...])
            p = np.zeros(E)
            p[left] = np.exp(logits[left]) / np.exp(logits[left]).sum()
            entropy[s, 0] -= sum(p[e] * np.log(p[e]) for e in left)
            left = sorted(left, key=lambda e: -logits[e])[:keep]
            hits[s, left] += 1
            mass[s] += p
            last, read = read, token + p @ embedding
        gate = 1.0
        if skip:
            gate = 1 / (1 + np.exp(-(last @ np.asarray(module.gate[...])[:, 0] + float(module.gate_bias[...][0]))))
            gates += gate
        if gate > 0.5:
            assert routing.experts[b, t].tolist() == left
            np.testing.assert_allclose(routing.weights[b, t], gate * p[left], rtol=1e-9)
        else:
            skipped += 1
            assert routing.experts[b, t].tolist() == [E] * stages[-1] and (routing.weights[b, t] == 0).all()
        np.testing.assert_allclose(routing.probs[b, t], p, rtol=1e-9)
    losses = {f"stage_{s}": 0.5 * E * (hits[s] / hits[s].sum() * mass[s] / real).sum() for s in range(len(stages) - 1)}
    losses |= {"price": 0.25 * gates / real} if skip else {}
    assert routing.aux.losses.keys() == losses.keys() and not routing.aux.policies
    for name, loss in losses.items():
        np.testing.assert_allclose(routing.aux.losses[name], loss, rtol=1e-9)
    np.testing.assert_allclose(routing.aux.traces["stage_entropy"], entropy[:, 0] / real, rtol=1e-9)
    if skip:
        np.testing.assert_allclose(routing.aux.traces["skipped"], skipped / real)
        assert 0 < skipped < real


def test_the_draw_and_its_probability(float64):
    """In the training form with REINFORCE: the policy says how likely the draw was, skipping included; the price is
    charged where a token ran, and is no loss."""
    module = make(6, 2, skip=True, price=0.25, reinforce=Reinforce(0.5, 0.9))
    (x, plain), (_, drawn), (_, other) = run(module), run(module, TRAINING), run(
        module, Training(jax.random.key(4), jnp.int32(0)))
    policy, ran = drawn.aux.policies["draw"], np.asarray(drawn.experts < E).all(-1)
    assert not plain.aux.policies and "price" not in {**plain.aux.losses, **drawn.aux.losses}
    assert (drawn.experts != other.experts).any() and 0 < ran.mean() < 1
    np.testing.assert_array_equal(policy.cost, 0.25 * ran)
    left = jnp.where(drawn.probs > 0, drawn.logits, -jnp.inf)
    read = x + jax.nn.softmax(x @ module.weight[0][...]) @ module.embedding[...]
    gate = jax.nn.sigmoid((read @ module.gate[...])[..., 0] + module.gate_bias[...])
    want = np.where(ran, jnp.log(gate) + log_chance(left, drawn.experts), jnp.log1p(-gate))
    np.testing.assert_allclose(policy.log_prob, want, rtol=1e-9)
    assert (policy.weight, policy.discount) == (0.5, 0.9)


def test_experts_alone_may_be_drawn(float64):
    module = make(6, 2, reinforce=Reinforce())
    _, drawn = run(module, TRAINING)
    left = jnp.where(drawn.probs > 0, drawn.logits, -jnp.inf)
    np.testing.assert_allclose(drawn.aux.policies["draw"].log_prob, log_chance(left, drawn.experts), rtol=1e-9)
    assert (drawn.aux.policies["draw"].cost == 0).all()


def test_balance_closed_form():
    """A first stage that keeps 2 of 8 and always the same two: 8 / 2; with an even one: 1."""
    module = cast(MixtureOfRouters((2, 1), balance=1.0).build(nnx.Rngs(0), Place(E), E, 1.0), jnp.float32)
    run = jax.jit(lambda m, x: m(x, tokens_of(np.ones((1, E)))).aux.losses["stage_0"])
    cost = lambda x: run(module, x)
    module.weight[0] = module.weight[0].replace(100 * (jnp.eye(E) + jnp.roll(jnp.eye(E), 1, 0)))
    np.testing.assert_allclose(cost(jnp.eye(E)[None]), 1, rtol=1e-5)
    np.testing.assert_allclose(cost(jnp.broadcast_to(jnp.eye(E)[3], (1, E, E))), 4, rtol=1e-5)


@pytest.mark.parametrize("fields, named", [
    (dict(stages=()), "MixtureOfRouters.stages = .*each stage must keep at least 1"),
    (dict(stages=(4, 0)), "MixtureOfRouters.stages = .*each stage must keep at least 1"),
    (dict(stages=(2, 4)), "MixtureOfRouters.stages = .*must not grow"),
    (dict(stages=(9, 2)), "MixtureOfRouters.stages = .*number of experts, 8"),
    (dict(balance=-1.0), "MixtureOfRouters.balance = -1.0"),
    (dict(price=-1.0), "MixtureOfRouters.price = -1.0"),
    (dict(price=1.0), "MixtureOfRouters.price = 1.0: .*skip=True"),
])
def test_bad_fields(fields, named):
    with pytest.raises(ValueError, match=named):
        MoE(E, 8, MixtureOfRouters(**fields))
