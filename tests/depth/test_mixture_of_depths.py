"""Mixture-of-Depths against a loop over tokens, in both forms and by both causal rules; and its random control."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.attention.attention import Attention
from archlab.depth.mixture_of_depths import MixtureOfDepths
from archlab.depth.mixture_of_recursions import MixtureOfRecursions
from archlab.depth.router import Choice, TokenRouter
from archlab.depth.routing import choose_within_budget
from archlab.depth.scorer import Scorer
from archlab.depth.top_tokens import RandomTokens, TopTokens
from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place, Tokens, Training
from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Provide, Sequence
from archlab.recurrence.mamba import Mamba
from tests.helpers import cast, in_pieces, jittered, tokens_of

B, T, D = 2, 40, 8
BLOCK = Sequence(Residual(Attention(2)), Residual(SwiGLU(12)))
SEGMENTS = np.repeat([[1, 2, 0]] * B, [23, 13, 4], axis=1).astype(np.int32)
TRAINING = Training(jax.random.key(0), jnp.int32(3))
PREDICTED = TopTokens("linear", "predictor", weight=0.1, hidden=6)


def module(config, seed=0):
    return cast(jittered(config.build(nnx.Rngs(seed), Place(D, 0, config.branches)), seed + 1, 0.3), jnp.float64)


def stream(length=T, seed=3):
    return jax.random.normal(jax.random.key(seed), (B, length, D), jnp.float64)


def score(scorer, x):
    """Of one token's stream [D]."""
    if scorer.up is None:
        return x @ np.asarray(scorer.out[...])[:, 0]
    h = x @ np.asarray(scorer.up[...])
    gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return gelu @ np.asarray(scorer.out[...])[:, 0]


def reference(made, config, x, segments, look_ahead):
    """Token by token: the block runs over the chosen alone, and the raw score scales what it adds."""
    block = jax.jit(lambda x, tokens: made.unit(x, tokens)[0])
    places, x = np.asarray(tokens_of(segments).positions), np.asarray(x)
    h, chosen, cost, agree = x.copy(), np.zeros((B, T), bool), [], []
    for row in range(B):
        real = np.flatnonzero(segments[row])
        scores = {t: score(made.router.router, x[row, t]) for t in real}
        said = {t: score(made.router.predictor or made.router.router, x[row, t]) for t in real}
        if look_ahead:
            chosen[row, sorted(real, key=lambda t: -scores[t])[: max(1, int(config.capacity * len(real)))]] = True
        passed = dict.fromkeys(segments[row], 0)
        for t in real:
            p = 1 / (1 + np.exp(-said[t]))
            if not look_ahead:
                room = passed[segments[row, t]] < int(config.capacity * (1 + config.slack) * (places[row, t] + 1))
                chosen[row, t] = said[t] > 0 and room
                passed[segments[row, t]] += chosen[row, t]
            cost.append(-np.log(p if chosen[row, t] else 1 - p))
            agree.append(chosen[row, t] == (said[t] > 0))
        at = np.flatnonzero(chosen[row])
        front = lambda a: np.concatenate([a[row, at], np.zeros((T - len(at), *a.shape[2:]), a.dtype)])[None]
        y = np.asarray(block(front(x), Tokens(front(segments), front(places))))[0, : len(at)]
        for t, out in zip(at, y):
            h[row, t] = x[row, t] + scores[t] * (out - x[row, t])
    return h, chosen, np.mean(cost), np.mean(agree)


@pytest.mark.parametrize("look_ahead", [True, False], ids=["training", "causal"])
@pytest.mark.parametrize("config", [
    MixtureOfDepths(BLOCK, 0.25, TopTokens("linear", weight=0.1)), MixtureOfDepths(BLOCK, 0.375, PREDICTED, slack=0.2),
], ids=["loss", "predictor"])
def test_against_loop(float64, config, look_ahead):
    made, x = module(config), stream()
    tokens = tokens_of(SEGMENTS, TRAINING if look_ahead else None)
    y, state, aux = jax.jit(lambda x: made(x, tokens))(x)
    h, chosen, cost, agree = reference(made, config, x, SEGMENTS, look_ahead)
    assert state is None and 0 < chosen.sum() < (SEGMENTS > 0).sum()
    np.testing.assert_array_equal(aux.traces["depth"], chosen)
    np.testing.assert_allclose(y, h, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(aux.losses["router"], 0.1 * cost if look_ahead else 0, rtol=1e-9)
    if look_ahead:
        np.testing.assert_allclose(aux.traces["agreement"], agree, rtol=1e-9)


@pytest.mark.parametrize("config", [
    MixtureOfDepths(BLOCK, 0.25, slack=0.5), MixtureOfDepths(BLOCK, 0.5, RandomTokens()),
    MixtureOfDepths(Residual(Mamba(state=4)), 0.4, PREDICTED),
], ids=["block", "random", "mamba"])
def test_splits_packing_and_padding(float64, config):
    made, x = module(config), stream()
    run = jax.jit(lambda x, tokens, state: made(x, tokens, state))
    tokens, real = tokens_of(SEGMENTS), SEGMENTS > 0
    whole, _, aux = run(x, tokens, None)
    assert 0 < aux.traces["depth"].sum() < real.sum()
    for cuts in ((40,), (19, 1, 1, 19), (1,) * 40):
        through = in_pieces(run, made.init_state(B, T, jnp.float64), x, tokens, cuts)
        np.testing.assert_allclose(through[real], whole[real], rtol=1e-9, atol=1e-9)
    alone, _, said = run(x[:, 23:36], tokens_of(np.ones((B, 13))), None)
    np.testing.assert_allclose(whole[:, 23:36], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 7, 8, 100])
def test_caches_shrink(length):
    """An eighth of the slots, and one at the least; with slack so many more."""
    for slack in (0.0, 1.0):
        made = nnx.eval_shape(lambda: MixtureOfDepths(Residual(Attention(2)), slack=slack).build(nnx.Rngs(0), Place(D)))
        state = jax.eval_shape(lambda: made.init_state(B, length))
        assert state.unit.keys.shape[2] == state.slots == max(1, int((1 + slack) * length) // 8)


def test_warmup(float64):
    """The capacity falls from all tokens to its share by half a cosine; so does the number of those who pass."""
    unit = Sequence(Residual(SwiGLU(12)), MixtureOfDepths(Residual(SwiGLU(12)), 0.5))  # which has traces of [B, T]
    made = module(MixtureOfDepths(unit, 0.25, TopTokens("linear", warmup=8)))
    run = jax.jit(lambda step: made(stream(), tokens_of(np.ones((B, T)), Training(jax.random.key(0), step)))[2])
    for step in range(12):
        share = 0.25 + 0.75 * 0.5 * (1 + np.cos(np.pi * min(step / 8, 1)))
        assert (run(step).traces["depth"].sum(1) == int(share * T + 1e-6)).all()


def test_only_the_predictor_learns_to_predict(float64):
    """Its loss moves neither the router nor what the stream comes from."""
    made = module(MixtureOfDepths(Residual(SwiGLU(12)), 0.25, PREDICTED))
    tokens = tokens_of(SEGMENTS, TRAINING)
    gradient, at_stream = jax.jit(jax.grad(lambda m, x: m(x, tokens)[2].loss(), (0, 1)))(made, stream())
    assert all(np.abs(gradient.router.predictor.out[...]) > 0)
    assert not np.any(gradient.router.router.out[...]) and not np.any(at_stream)
    learns = jax.jit(jax.grad(lambda m: (m(stream(), tokens)[0] ** 3).sum()))(made)
    assert np.all(learns.router.router.out[...]) and not np.any(learns.router.predictor.out[...])


def test_random_tokens_are_drawn_anew(float64):
    made = module(MixtureOfDepths(Residual(SwiGLU(12)), 0.5, RandomTokens()))
    draw = lambda seed: made(stream(), tokens_of(np.ones((B, T)), Training(jax.random.key(seed), 0)))[2].traces["depth"]
    stack = module(Repeat(MixtureOfDepths(Residual(SwiGLU(12)), 0.5, RandomTokens()), 2))
    first, second = stack(stream(), tokens_of(np.ones((B, T))))[2].traces["unit/depth"]
    assert (first != second).any() and (first[0] == first[1]).all()
    assert (draw(0).sum(1) == T // 2).all() and (draw(0) != draw(1)).any() and (draw(0)[0] != draw(0)[1]).any()


def test_random_recursions_are_nested(float64):
    """Who is drawn for a recursion was drawn for those before: as many go on as in the look ahead, budgets apart."""
    unit, length = Residual(SwiGLU(12)), 2000
    made = module(MixtureOfRecursions(unit, 4, router=RandomTokens(), slack=10.0))
    x = jnp.zeros((1, length, D))
    for training in (None, TRAINING):
        depth = np.asarray(made(x, tokens_of(np.ones((1, length)), training))[2].traces["depth"])
        shares = [(depth > r).mean() for r in range(4)]
        np.testing.assert_allclose(shares, [1, 0.75, 0.5, 0.25], atol=0.001 if training else 0.03)


class Evens(TokenRouter):
    looks_ahead = False

    def build(self, rngs, at):
        return EvensModule()


class EvensModule(nnx.Module):
    def __call__(self, x, candidates, share, room, places, tokens, passed, look_ahead):
        wish = candidates & (places % 2 == 1)
        chosen, passed = choose_within_budget(wish, room, places, tokens.real, passed)
        return Choice(chosen, candidates.astype(x.dtype), passed)


def test_a_router_of_ones_own(float64):
    """A config and a module are enough; one that never looks ahead is causal in training, too."""
    config = MixtureOfDepths(BLOCK, 0.5, Evens())
    made, tokens = module(config), tokens_of(SEGMENTS)
    y, _, aux = made(stream(), tokens)
    trained = made(stream(), tokens_of(SEGMENTS, TRAINING))
    assert not config.looks_ahead and not MixtureOfRecursions(BLOCK, 2, router=Evens()).looks_ahead
    np.testing.assert_array_equal(aux.traces["depth"], (tokens.positions % 2 == 1) & tokens.real)
    np.testing.assert_array_equal(trained[0], y)


def test_published_values_stay_inside(float64):
    """Others have none of what the block published for its own tokens."""
    inner = MixtureOfDepths(Provide("v", Residual(Attention(2))), 0.5)
    assert module(inner)(stream(), tokens_of(SEGMENTS))[2].provides == {}


def test_scores_are_wide():
    """Choices hang on them: in bfloat16, too, they are computed in float32."""
    scorer, x = Scorer(nnx.Rngs(0), 64, 1, 16), jax.random.normal(jax.random.key(0), (2, 50, 64), jnp.bfloat16)
    np.testing.assert_allclose(scorer(x), scorer(x.astype(jnp.float32)), rtol=1e-6)


def test_accounts():
    config = MixtureOfDepths(BLOCK)
    assert config.branches == 2 and config.causal and config.looks_ahead
    assert not MixtureOfDepths(BLOCK, 1.0).looks_ahead
    made = nnx.eval_shape(lambda: config.build(nnx.Rngs(0), Place(D, 0, 2)))
    uses = {path.split("/")[0]: weight.uses for path, weight in parameters_of(made).items()}
    assert uses == {"unit": 0.125, "router": 1}


@pytest.mark.parametrize("make, words", [
    (lambda: MixtureOfDepths(BLOCK, 0.0), r"MixtureOfDepths.capacity = 0.0: must lie in \(0, 1\]"),
    (lambda: MixtureOfDepths(BLOCK, 1.5), r"capacity = 1.5"),
    (lambda: MixtureOfDepths(BLOCK, 1e-4), r"rounds to no token: must be at least 1/1000"),
    (lambda: MixtureOfDepths(BLOCK, slack=-0.1), r"slack = -0.1: must be 0"),
    (lambda: TopTokens("softmax"), r"TopTokens.gate = 'softmax'"),
    (lambda: TopTokens(causal="guess"), r"TopTokens.causal = 'guess'"),
    (lambda: TopTokens(weight=-1.0), r"TopTokens.weight = -1.0: must be 0"),
    (lambda: TopTokens(hidden=0), r"TopTokens.hidden = 0: must be at least 1"),
    (lambda: TopTokens(warmup=-1), r"TopTokens.warmup = -1: must be 0"),
])
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
