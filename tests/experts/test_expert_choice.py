"""Expert choice against a loop over experts, its causal form, and the thresholds between the two."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.attention.attention import Attention
from archlab.experts.balance import ZLoss
from archlab.experts.capacity import Capacity
from archlab.experts.expert_choice import ExpertChoice
from archlab.experts.moe import MoE
from archlab.layers.contract import Place, Training
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.layers.weights import merge, split
from archlab.model import LanguageModel
from archlab.training.step import move
from tests.helpers import build, cast, tokens_of

D, E, F = 8, 5, 6
SEGMENTS = np.array([[1] * 12, [1] * 4 + [2] * 3 + [0] * 5, [0] * 12])
TRAINING = Training(jax.random.key(3), jnp.int32(0))


def make(factor=2.0, **fields):
    module = MoE(E, F, ExpertChoice(factor, **fields), balance=(ZLoss(),)).build(nnx.Rngs(0), Place(D))
    return cast(module, jnp.float64), jax.random.normal(jax.random.key(1), (3, 12, D), jnp.float64)


def expert(module, e, x):
    gate = x @ np.asarray(module.gate[...][e])
    return (gate / (1 + np.exp(-gate)) * (x @ np.asarray(module.up[...][e]))) @ np.asarray(module.down[...][e])


def scores_of(module, x):
    odds = np.exp(np.asarray(x) @ np.asarray(module.router.weight[...]))
    return odds / odds.sum(-1, keepdims=True)


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0, 5.0])
def test_experts_choose_as_in_the_paper(float64, factor):
    """S = softmax over experts; each expert's k = n c / E best tokens of the row; y = sum of S times its output."""
    module, x = make(factor)
    y, _, aux = jax.jit(lambda m, x: m(x, tokens_of(SEGMENTS, TRAINING)))(module, x)
    S, want, last, pairs = scores_of(module, x), np.zeros(x.shape), np.zeros((2, E)), 0
    threshold, agree = np.asarray(module.router.threshold[...]), 0
    for row, n in enumerate((12, 7)):
        for e in range(E):
            taken = np.argsort(-S[row, :n, e])[: math.ceil(factor * n / E - 1e-9)]
            last[row, e] = S[row, taken[-1], e]
            for t in range(n):
                better = (S[row, t] > S[row, t, e]).sum()
                passes = S[row, t, e] >= threshold[e] and better < min(E, 2 * math.ceil(factor))
                agree += passes == (t in taken)
                if t in taken:
                    want[row, t] += S[row, t, e] * expert(module, e, np.asarray(x[row, t]))
                    pairs += 1
    np.testing.assert_allclose(y, want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(aux.traces["load"], 1 / E)
    assert aux.traces["dropped"] == 0 and (aux.traces["choices"] >= 0).sum() == pairs
    np.testing.assert_allclose(aux.traces["router/agreement"], agree / (19 * E))
    np.testing.assert_allclose(aux.updates["router/threshold"], 0.01 * (last.mean(0) - threshold))


def test_the_causal_form(float64):
    """Those of the `most` best experts whose thresholds the score reaches."""
    module, x = make(0.7, most=2)
    y, _, aux = jax.jit(lambda m, x: m(x, tokens_of(SEGMENTS)))(module, x)
    S, threshold, want, counts = scores_of(module, x), np.asarray(module.router.threshold[...]), np.zeros(x.shape), []
    for row, t in zip(*np.nonzero(SEGMENTS)):
        chosen = [e for e in np.argsort(-S[row, t])[:2] if S[row, t, e] >= threshold[e]]
        counts.append(len(chosen))
        for e in chosen:
            want[row, t] += S[row, t, e] * expert(module, e, np.asarray(x[row, t]))
    np.testing.assert_allclose(y, want, rtol=1e-9, atol=1e-12)
    assert set(counts) == {0, 1, 2} and not aux.updates and "router/agreement" not in aux.traces


def test_training_looks_ahead_and_nothing_else_does(float64):
    """A later token takes an earlier one's place: shown by the earlier one's output."""
    module, x = make(1.0)
    run = jax.jit(lambda x, training=None: module(x, tokens_of(np.ones((3, 12)), training))[0])
    rival = x.at[:, -1].set(3 * x[:, 2])  # wants what token 2 wants, more strongly
    assert np.abs(run(rival, TRAINING)[:, :-1] - run(x, TRAINING)[:, :-1]).max() > 0.01
    np.testing.assert_array_equal(run(rival)[:, :-1], run(x)[:, :-1])


def test_padding_is_never_chosen(float64):
    module, x = make()
    run = jax.jit(lambda x, segments: module(x, tokens_of(segments, TRAINING))[::2])
    longer = jnp.full((4, 17, D), 9.0).at[:3, :12].set(x)
    (y, aux), (padded, said) = run(x, SEGMENTS), run(longer, np.pad(SEGMENTS, ((0, 1), (0, 5))))
    np.testing.assert_allclose(padded[:3, :12], y, rtol=1e-12)
    np.testing.assert_allclose(said.updates["router/threshold"], aux.updates["router/threshold"], rtol=1e-9)
    np.testing.assert_allclose(said.traces["router/agreement"], aux.traces["router/agreement"])
    nothing = run(x, np.zeros((3, 12)))
    assert (nothing[0] == 0).all() and (nothing[1].updates["router/threshold"] == 0).all()


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_thresholds_find_the_factor(factor):
    """On tokens that are alike from step to step, the causal form comes to send a token to `factor` experts on average,
    though the router is lopsided and no threshold began where it ends; and the two rules come to agree."""
    module = MoE(8, F, ExpertChoice(factor, most=8, rate=0.1), balance=()).build(nnx.Rngs(0), Place(D))
    module.router.weight = module.router.weight.replace(module.router.weight[...] * jnp.linspace(0.5, 3, 8))
    structure, params, rest = split(module)
    tokens = lambda training=None: tokens_of(np.ones((8, 64)), training)

    @jax.jit
    def step(rest, key):
        aux = merge(structure, params, rest)(jax.random.normal(key, (8, 64, D)), tokens(TRAINING))[2]
        return move(rest, aux.updates, {}), aux.traces["router/agreement"]

    @jax.jit
    def used(rest):
        choices = merge(structure, params, rest)(jax.random.normal(jax.random.key(9), (8, 64, D)), tokens())[2].traces
        return (choices["choices"] >= 0).sum() / (8 * 64)

    before, agreements = float(used(rest)), []
    for key in jax.random.split(jax.random.key(2), 60):
        rest, agreement = step(rest, key)
        agreements.append(float(agreement))
    assert abs(float(used(rest)) / factor - 1) < 0.1 < abs(before / factor - 1)
    assert np.mean(agreements[-10:]) > 0.93 > agreements[0]


def test_three_numbers():
    """What a user compares: the loss that looks ahead, the loss of the causal rule, and how far the two agree."""
    block = Sequence(Residual(Attention(2)), Residual(MoE(4, 16, ExpertChoice(1.0), balance=())))
    model = build(LanguageModel(32, 16, block))
    ids = jax.random.randint(jax.random.key(0), (4, 33), 0, 32)

    @jax.jit
    def look(training=None):
        out = model(ids[:, :-1], training=training or False)
        return model.losses(out.hidden, ids[:, 1:]).mean(), out.aux.traces

    (leaky, traces), (causal, _) = look(TRAINING), look()
    agreement = traces["body/layers/1/layer/router/agreement"]
    assert np.isfinite(leaky) and np.isfinite(causal) and leaky != causal and 0.5 < agreement < 1


@pytest.mark.parametrize("make, named", [
    (lambda: ExpertChoice(0.0), "ExpertChoice.factor = 0.0"),
    (lambda: ExpertChoice(most=0), "ExpertChoice.most = 0"),
    (lambda: ExpertChoice(rate=2.0), "ExpertChoice.rate = 2.0"),
    (lambda: MoE(4, 8, ExpertChoice(5.0)), "ExpertChoice.factor = 5.0: .* number of experts, 4"),
    (lambda: MoE(4, 8, ExpertChoice(most=5)), "ExpertChoice.most = 5: .* number of experts, 4"),
    (lambda: MoE(4, 8, ExpertChoice(), Capacity(1.0)), "MoE.capacity = .*ExpertChoice bounds by itself"),
])
def test_bad_fields(make, named):
    with pytest.raises(ValueError, match=named):
        make()
