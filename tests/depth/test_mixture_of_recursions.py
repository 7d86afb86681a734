"""Mixture-of-Recursions against a loop over tokens, in both forms, and what only it has to keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.attention.attention import Attention
from archlab.attention.cache import KVCache
from archlab.depth.mixture_of_recursions import MixtureOfRecursions
from archlab.depth.top_tokens import TopTokens
from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Aux, Layer, Place, Tokens, Training
from archlab.layers.mlp import SwiGLU
from archlab.layers.residual import Residual
from archlab.layers.sequence import Identity, Provide, Sequence
from archlab.recurrence.mamba import Mamba
from archlab.zoo import get_config
from tests.helpers import in_pieces, cast, jittered, tokens_of

B, T, D = 2, 40, 8
BLOCK = Sequence(Residual(Attention(2)), Residual(SwiGLU(12)))
MAMBA = Residual(Mamba(state=4))
SEGMENTS = np.repeat([[1, 2, 0]] * B, [23, 13, 4], axis=1).astype(np.int32)
TRAINING = Training(jax.random.key(0), jnp.int32(3))


def module(config, seed=0):
    return cast(jittered(config.build(nnx.Rngs(seed), Place(D, 0, config.branches)), seed + 1, 0.3), jnp.float64)


def stream(length=T, seed=3):
    return jax.random.normal(jax.random.key(seed), (B, length, D), jnp.float64)


def reference(made, capacities, x, segments, look_ahead):
    """Token by token. The unit is called on a row's chosen tokens, which stand first, as on any text with padding."""
    unit = jax.jit(lambda x, tokens: made.unit(x, tokens)[0])
    places = np.asarray(tokens_of(segments).positions)
    h, depth, loss, agreement = np.array(x), np.zeros((B, T), int), np.zeros(len(capacities)), []
    active = segments > 0
    for r, capacity in enumerate(capacities):
        scores = h @ np.asarray(made.routers[r].router.out[...])[:, 0]
        chosen, bce, agree = np.zeros((B, T), bool), [], []
        for row in range(B):
            candidates = np.flatnonzero(active[row])
            if capacity == 1:
                chosen[row] = active[row]
            elif look_ahead:
                wanted = max(1, int(capacity * (segments[row] > 0).sum() + 1e-9))
                chosen[row, sorted(candidates, key=lambda t: -scores[row, t])[:wanted]] = True
                for t in candidates:
                    p = 1 / (1 + np.exp(-scores[row, t]))
                    bce.append(-np.log(p if chosen[row, t] else 1 - p))
            else:
                passed = dict.fromkeys(segments[row], 0)
                for t in candidates:
                    document = segments[row, t]
                    room = passed[document] < int(capacity * (places[row, t] + 1) + 1e-9)
                    if scores[row, t] > 0 and room:
                        chosen[row, t] = True
                        passed[document] += 1
            agree += [chosen[row, t] == (capacity == 1 or scores[row, t] > 0) for t in candidates]
        for row in range(B):
            at = np.flatnonzero(chosen[row])
            front = lambda a: np.concatenate([a[row, at], np.zeros((T - len(at), *a.shape[2:]), a.dtype)])[None]
            y = np.asarray(unit(front(h), Tokens(front(segments), front(places))))[0, :len(at)]
            h[row, at] += y / (1 + np.exp(-scores[row, at]))[:, None]
            depth[row, at] += 1
        active, loss[r] = chosen, np.mean(bce) if bce else 0
        agreement.append(np.mean(agree))
    return h, depth, loss, agreement


@pytest.mark.parametrize("look_ahead", [True, False], ids=["training", "causal"])
@pytest.mark.parametrize("unit, capacities", [(BLOCK, None), (MAMBA, (0.7, 0.5, 0.25))], ids=["attention", "mamba"])
def test_against_loop(float64, unit, capacities, look_ahead):
    config = MixtureOfRecursions(unit, 3, capacities, TopTokens(weight=0.1))
    made, x = module(config), stream()
    tokens = tokens_of(SEGMENTS, TRAINING if look_ahead else None)
    y, state, aux = jax.jit(lambda x: made(x, tokens))(x)
    h, depth, loss, agreement = reference(made, capacities or (1, 2 / 3, 1 / 3), x, SEGMENTS, look_ahead)
    assert state is None
    np.testing.assert_array_equal(aux.traces["depth"], depth)
    np.testing.assert_allclose(y, h, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(aux.losses["router"], 0.1 * loss.sum(), rtol=1e-9)
    assert len(set(depth[SEGMENTS > 0])) >= 3  # otherwise there was nothing to see
    if look_ahead:
        np.testing.assert_allclose(aux.traces["agreement"], agreement, rtol=1e-9)


@pytest.mark.parametrize("unit", [BLOCK, Sequence(Residual(Attention(2, window=5)), MAMBA)], ids=["block", "hybrid"])
def test_splits_packing_and_padding(float64, unit):
    """Every cut through the state gives what one pass gives, though caches hold no more than their share."""
    made, x = module(MixtureOfRecursions(unit, 3)), stream()
    run = jax.jit(lambda x, tokens, state: made(x, tokens, state))
    tokens, real = tokens_of(SEGMENTS), SEGMENTS > 0
    whole, _, aux = run(x, tokens, None)
    for cuts in ((40,), (19, 1, 1, 19), (1,) * 40):
        through = in_pieces(run, made.init_state(B, T, jnp.float64), x, tokens, cuts)
        np.testing.assert_allclose(through[real], whole[real], rtol=1e-9, atol=1e-9)
    alone, _, said = run(x[:, 23:36], tokens_of(np.ones((B, 13))), None)
    np.testing.assert_allclose(whole[:, 23:36], alone, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(aux.traces["depth"][:, 23:36], said.traces["depth"])


def test_many_short_documents_fit(float64):
    """A row full of documents of one to four tokens, through a state: no cache overflows, nothing is lost."""
    made = module(MixtureOfRecursions(Residual(Attention(2)), 3))
    segments = np.tile(np.repeat(np.arange(1, 17), [1, 2, 3, 4] * 4), (B, 1))
    run = jax.jit(lambda x, state: made(x, tokens_of(segments), state)[0])
    whole, through = run(stream(), None), run(stream(), made.init_state(B, T, jnp.float64))
    np.testing.assert_allclose(through, whole, rtol=1e-9, atol=1e-9)


def test_prompt_shorter_than_the_recursions(float64):
    made, x = module(MixtureOfRecursions(Residual(Attention(2)), 4)), stream(2)
    run = jax.jit(lambda x, state, training: made(x, tokens_of(np.ones((B, 2)), training), state))
    y, _, aux = run(x, None, None)
    assert (aux.traces["depth"][:, 0] == 1).all()  # only a full share admits a first token
    np.testing.assert_allclose(run(x, made.init_state(B, 2, jnp.float64), None)[0], y, rtol=1e-12)
    trained, _, aux = run(x, None, TRAINING)
    assert np.isfinite(trained).all() and (aux.traces["depth"].max(1) == 4).all()  # its best token always goes on


@pytest.mark.parametrize("length", [1, 2, 40, 100])
def test_caches_shrink(length):
    """Recursion r holds floor(share_r * length) tokens, and one at the least."""
    for config in (MixtureOfRecursions(BLOCK, 3), get_config("mixture-of-recursions-nano").body.layers[1]):
        made = nnx.eval_shape(lambda: config.build(nnx.Rngs(0), Place(32, 0, 1)))
        state = jax.eval_shape(lambda: made.init_state(B, length))
        for r, inner in enumerate(state.units):
            is_cache = lambda node: isinstance(node, KVCache)
            caches = list(filter(is_cache, jax.tree.leaves(inner, is_leaf=is_cache)))
            heads, size = caches[0].keys.shape[1], caches[0].keys.shape[3]
            assert caches and sum(s.keys.size + s.values.size for s in caches) * 4 == (
                len(caches) * 2 * 4 * B * heads * size * max(1, (3 - r) * length // 3))


def test_gates_learn_and_published_values_follow(float64):
    """Every router has a gradient through its gate alone; values of [B, T] are gathered with their tokens."""
    routed = MixtureOfRecursions(Residual(SwiGLU(12)), 3, router=TopTokens(weight=0.0))
    made, tokens = module(Sequence(Provide("origin", Identity()), routed)), tokens_of(SEGMENTS, TRAINING)
    gradient = jax.jit(jax.grad(lambda m: (m(stream(), tokens)[0] ** 3).sum()))(made)
    assert all(np.abs(choice.router.out[...]).min() > 0 for choice in gradient.layers[1].routers)

    seen = []

    class Spy(Layer):
        def __call__(self, x, tokens, state=None):
            seen.append((x, tokens))
            return jnp.zeros_like(x), None, Aux()

    made.layers[1].unit = Spy()
    made(stream(), tokens)
    assert [x.shape[1] for x, _ in seen] == [40, 26, 13]
    for x, gathered in seen:  # a unit that adds nothing leaves the stream as it was
        np.testing.assert_array_equal(gathered.provided["origin"], x)


def test_training_looks_ahead_and_evaluation_does_not(float64):
    """The leak is real, and it is confined to the training form."""
    made, x = module(MixtureOfRecursions(BLOCK, 3)), stream()
    other = x.at[:, 30:].set(stream(T, 4)[:, 30:])
    run = jax.jit(lambda x, training: made(x, tokens_of(np.ones((B, T)), training))[0][:, :30])
    assert not np.allclose(run(x, TRAINING), run(other, TRAINING), atol=1e-6)
    np.testing.assert_allclose(run(x, None), run(other, None), rtol=1e-9, atol=1e-9)


def test_accounts():
    config = MixtureOfRecursions(BLOCK, 3)
    assert config.branches == 6 and config.causal and not config.recurrent
    assert MixtureOfRecursions(MAMBA, 3).recurrent
    made = nnx.eval_shape(lambda: config.build(nnx.Rngs(0), Place(D, 0, 6)))
    uses = {path.split("/")[0]: weight.uses for path, weight in parameters_of(made).items()}
    assert uses == {"unit": 2, "routers": 1}


@pytest.mark.parametrize("make, words", [
    (lambda: MixtureOfRecursions(BLOCK, 0), r"MixtureOfRecursions.n = 0: must be at least 1"),
    (lambda: MixtureOfRecursions(BLOCK, 3, (1.0, 0.5)), r"capacities = \(1.0, 0.5\): must be a tuple of n = 3"),
    (lambda: MixtureOfRecursions(BLOCK, 2, [1.0, 0.5]), r"capacities = \[1.0, 0.5\]: must be a tuple"),
    (lambda: MixtureOfRecursions(BLOCK, 2, (1.0, 0.0)), r"capacities = \(1.0, 0.0\): each must lie in \(0, 1\]"),
    (lambda: MixtureOfRecursions(BLOCK, 2, (1.2, 0.5)), r"each must lie in \(0, 1\]"),
    (lambda: MixtureOfRecursions(BLOCK, 2, (1.0, 1e-4)), r"rounds to no token: each must be at least 1/1000"),
    (lambda: MixtureOfRecursions(BLOCK, 2, (0.5, 0.6)), r"capacities = \(0.5, 0.6\): must not grow"),
    (lambda: MixtureOfRecursions(BLOCK, 2, slack=-1.0), r"slack = -1.0: must be 0"),
    (lambda: MixtureOfRecursions(BLOCK, 2, slack=float("inf")), r"slack = inf: must be 0 .* and finite"),
    (lambda: MixtureOfRecursions(BLOCK, 2, cache="share"), r"cache = 'share'"),
    (lambda: MixtureOfRecursions(BLOCK, 2, (0.5, 0.5), cache="shared"), r"the first must be 1"),
    (lambda: MixtureOfRecursions(MAMBA, 2, cache="shared").check(D), r"this one has other memory"),
    (lambda: MixtureOfRecursions(Residual(SwiGLU(4)), 2, cache="shared").check(D), r"this one has no memory"),
    (lambda: MixtureOfRecursions(Residual(Attention(2, window=9)), 2, cache="shared").check(D), r"has a window's keys"),
])
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
