"""REINFORCE against loops and exact gradients, and on a toy whose best policy is known."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from archlab.data.batches import Batch
from archlab.depth.mixture_of_recursions import MixtureOfRecursions
from archlab.depth.recur import Recur
from archlab.experts.balance import ZLoss
from archlab.experts.mixture_of_routers import MixtureOfRouters
from archlab.experts.moe import MoE
from archlab.experts.sampled import Reinforce, Sampled
from archlab.layers.contract import Place, Policy, Training
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Gated, Identity, Parallel, Provide, Sequence
from archlab.layers.weights import merge
from archlab.model import LanguageModel
from archlab.training.reinforce import surrogate
from archlab.training.step import create_state, make_train_step
from tests.helpers import build, tokens_of

TRAINING = Training(jax.random.key(3), jnp.int32(0))
DRAWN = Residual(MoE(4, 6, Sampled(1, Reinforce())))


def policy(log_prob, cost, weight=1.0, discount=0.0):
    return Policy(*(jnp.asarray(a, jnp.float32) for a in (log_prob, cost, weight, discount)))


def test_against_a_slow_loop():
    """Charges, baseline and sum, with documents, padding, a target that does not count, and two copies."""
    draw, segments = np.random.default_rng(0), np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    weights = np.array([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 1.0]])
    nll, log_prob, cost = draw.uniform(0, 3, (2, 6)), -draw.uniform(size=(2, 2, 6)), draw.uniform(size=(2, 2, 6))
    settings, want = [(1.0, 0.0), (0.5, 0.8)], 0
    for n, (weight, discount) in enumerate(settings):
        charge = cost[n].copy()
        for b, t in np.ndindex(2, 6):
            for s in range(t, 6):
                if segments[b, s] == segments[b, t]:
                    charge[b, t] += discount ** (s - t) * weights[b, s] * nll[b, s]
        baseline = charge[weights > 0].mean()
        want += weight * ((charge - baseline) * log_prob[n])[weights > 0].sum()
    broken = np.where(weights > 0, nll, np.nan)  # what does not count may be anything
    got = jax.jit(surrogate)(broken, weights, segments, {"a": policy(log_prob, cost, *np.array(settings).T)})
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert surrogate(jnp.ones((2, 6)), jnp.ones((2, 6)), jnp.ones((2, 6), int), {}) == 0


def test_the_gradient_is_that_of_the_expected_loss():
    """Bernoulli draws, a loss of 2 where a token did not run and a price of 0.5 where it did: the expected charge of a
    token is 2 (1 - p) + 0.5 p, so its gradient by the logit is -1.5 p (1 - p)."""
    logit, count = jnp.array(0.4), 200_000
    p = jax.nn.sigmoid(logit)
    runs = jax.random.bernoulli(jax.random.key(0), p, (1, count))
    ones = jnp.ones((1, count))

    def loss(logit):
        drawn = policy(jnp.zeros(()), 0.5 * runs)
        drawn = dataclasses.replace(drawn, log_prob=jnp.where(runs, jax.nn.log_sigmoid(logit),
                                                              jax.nn.log_sigmoid(-logit)))
        return surrogate(2.0 * ~runs, ones, ones.astype(int), {"draw": drawn}) / count

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(logit), -1.5 * p * (1 - p), rtol=0.02)


def test_the_loss_itself_is_not_taught():
    """No gradient goes through the charge."""
    log_prob = policy(-jnp.ones((1, 3)), jnp.ones((1, 3)))
    grad = jax.grad(lambda nll: surrogate(nll, jnp.ones((1, 3)), jnp.ones((1, 3), int), {"a": log_prob}))
    assert (grad(jnp.arange(3.0)[None]) == 0).all()


def test_policies_must_be_over_the_tokens():
    with pytest.raises(ValueError, match=r"a/draw: drawn for tokens \(2, 3\), the loss is of \(2, 4\)"):
        surrogate(jnp.ones((2, 4)), jnp.ones((2, 4)), jnp.ones((2, 4), int),
                  {"a/draw": policy(jnp.ones((2, 3)), jnp.ones((2, 3)))})


@pytest.mark.parametrize("body, paths", [
    (Repeat(DRAWN, 3, scan=False), {"unit/layer/router/draw": (3,)}),
    (Repeat(DRAWN, 3, scan=True), {"unit/layer/router/draw": (3,)}),
    (Recur(Repeat(DRAWN, 2), 3, scan=True), {"unit/unit/layer/router/draw": (3, 2)}),
    (Sequence(Identity(), Parallel(DRAWN, Gated(DRAWN.layer))),
     {"layers/1/layers/0/layer/router/draw": (), "layers/1/layers/1/layer/router/draw": ()}),
    (Provide("here", DRAWN), {"layer/layer/router/draw": ()}),
], ids=lambda value: type(value).__name__)
def test_combinators_hand_policies_on(body, paths):
    module, x = body.build(nnx.Rngs(0), Place(8, 0, body.branches)), jnp.ones((2, 5, 8))
    aux = jax.eval_shape(lambda x: module(x, tokens_of(np.ones((2, 5)), TRAINING))[2], x)
    shapes = {path: (p.log_prob.shape, p.cost.shape, p.weight.shape) for path, p in aux.policies.items()}
    assert shapes == {path: ((*n, 2, 5), (*n, 2, 5), n) for path, n in paths.items()}


def test_scanned_copies_say_what_unrolled_ones_say():
    said, x = [], jax.random.normal(jax.random.key(0), (2, 5, 8))
    for scan in (False, True):
        module = Repeat(DRAWN, 2, scan=scan).build(nnx.Rngs(0), Place(8, 0, 2))
        said.append(jax.jit(lambda x: module(x, tokens_of(np.ones((2, 5)), TRAINING))[2])(x))
    chex.assert_trees_all_close(*said, rtol=1e-4, atol=1e-5)


def test_recursions_put_policies_back():
    """A recursion's draws are for the tokens that it gathered: back in their places, and nothing elsewhere."""
    module = MixtureOfRecursions(Repeat(DRAWN, 2), 2).build(nnx.Rngs(0), Place(8, 0, 4))
    x, segments = jax.random.normal(jax.random.key(0), (2, 9, 8)), np.array([[1] * 9, [1] * 5 + [0] * 4])
    aux = jax.jit(lambda x: module(x, tokens_of(segments, TRAINING))[2])(x)
    for r in range(2):
        drawn = aux.policies[f"unit/{r}/unit/layer/router/draw"].log_prob
        passed = (np.asarray(aux.traces["depth"]) > r) & (segments > 0)
        assert drawn.shape == (2, 2, 9)
        np.testing.assert_array_equal(drawn != 0, np.broadcast_to(passed, drawn.shape))


def test_the_model_puts_policies_back():
    """Padding on the left: each draw stands at the token that it was made for."""
    model = build(LanguageModel(16, 8, DRAWN))
    ids, pad = jax.random.randint(jax.random.key(0), (1, 5), 0, 16), jnp.zeros((1, 3), int)
    run = jax.jit(lambda ids, segments: model(ids, segment_ids=segments, training=TRAINING).aux.policies)
    right = run(jnp.concatenate([ids, pad], 1), jnp.array([[1] * 5 + [0] * 3]))["body/layer/router/draw"]
    left = run(jnp.concatenate([pad, ids], 1), jnp.array([[0] * 3 + [1] * 5]))["body/layer/router/draw"]
    np.testing.assert_array_equal(left.log_prob[:, 3:], right.log_prob[:, :5])
    assert (left.log_prob[:, :3] == 0).all() and (right.log_prob[:, :5] != 0).all()


def toy(price: float):
    """A language model of 4 tokens whose weights, but for the router's, are given. Tokens 2 and 3 are followed by what
    the head reads off their embedding; for tokens 0 and 1 only the expert knows what follows. To run the expert on
    those, and on no others, is the best that a policy can do: a skipped one costs log 4 - 0.03 nats, more than the
    price."""
    router = MixtureOfRouters((1,), skip=True, price=price, reinforce=Reinforce())
    config = LanguageModel(4, 6, Residual(MoE(1, 2, router, balance=(ZLoss(),)), before=None), norm=None, tied=False)
    transform = optax.masked(optax.adam(0.05), lambda params: {path: "router" in path for path in params})
    frozen = optax.masked(optax.set_to_zero(), lambda params: {path: "router" not in path for path in params})
    transform = optax.chain(transform, frozen)
    structure, state, _ = create_state(config, transform, seed=0)
    asked = np.zeros((6, 2), np.float32)
    asked[[0, 1], [0, 1]] = 3.0  # the expert answers tokens 0 and 1, in channels 4 and 5
    answer = np.zeros((2, 6), np.float32)
    answer[[0, 1], [4, 5]] = 1.0
    head = np.zeros((6, 4), np.float32)
    head[[2, 3, 4, 5], [3, 2, 1, 0]] = 5.0
    given = {"embed/table": np.eye(4, 6, dtype=np.float32), "body/layer/up": asked[None],
             "body/layer/gate": asked[None], "body/layer/down": answer[None]}
    name = next(path for path in state.params if path.startswith("head/"))
    given[name] = head if state.params[name].shape == head.shape else head.T
    assert given.keys() <= state.params.keys()
    params = state.params | {path: jnp.asarray(value) for path, value in given.items()}
    return structure, dataclasses.replace(state, params=params), transform


@pytest.mark.parametrize("price, runs", [(0.3, [True, True, False, False]), (0.0, [True] * 4)])
def test_the_best_policy_is_found(price, runs):
    """Trained by the language model's loss and the price alone. Where running is free, it always runs."""
    structure, state, transform = toy(price)
    step, after = make_train_step(structure, transform, np.ones(4)), np.array([1, 0, 3, 2])
    draw = np.random.default_rng(0)
    for _ in range(150):
        ids = draw.integers(0, 4, (8, 16)).astype(np.int32)
        ones = np.ones((8, 16), np.int32)
        state, _ = step(state, Batch(ids, after[ids].astype(np.int32), ones, ones.astype(np.float32)), seed=1)
    model, ids = merge(structure, state.params, state.rest), jnp.arange(4)[None]
    out = jax.jit(lambda model: model(ids))(model)
    assert (out.aux.traces["body/layer/choices"][0, :, 0] >= 0).tolist() == runs
    nats = -jax.nn.log_softmax(out.logits)[0, jnp.arange(4), after]
    assert (nats < 0.05).all()
    charge = float(nats.mean()) + price * np.mean(runs)
    best = min(np.log(4) / 2, price / 2) if price else 0.0
    assert charge < best + 0.05
