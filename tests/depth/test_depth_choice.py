"""Token choice: against a loop over tokens; and keys that all recursions share, with either router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.analysis.flops import count
from archlab.attention.attention import Attention
from archlab.depth.depth_choice import DepthChoice
from archlab.depth.mixture_of_recursions import MixtureOfRecursions
from archlab.depth.own import LowRank, Own
from archlab.depth.recur import Recur
from archlab.depth.top_tokens import TopTokens
from archlab.experts.balance import SwitchLoss
from archlab.layers.contract import Place, Tokens, Training
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from tests.helpers import cast, in_pieces, jittered, tokens_of

B, T, D, N = 2, 40, 8, 3
BLOCK = Sequence(Residual(Attention(2)), Residual(SwiGLU(12)))
SEGMENTS = np.repeat([[1, 2, 0]] * B, [23, 13, 4], axis=1).astype(np.int32)
TRAINING = Training(jax.random.key(0), jnp.int32(3))
SHARES = (1, 2 / 3, 1 / 3)


def module(config, seed=0):
    return cast(jittered(config.build(nnx.Rngs(seed), Place(D, 0, config.branches)), seed + 1, 0.3), jnp.float64)


def stream(length=T, seed=3):
    return jax.random.normal(jax.random.key(seed), (B, length, D), jnp.float64)


def chosen_depths(logits, segments, bias=0.0):
    """Depth of each token of one row: what it wants, as far as its document's budgets allow."""
    depth, passed, seen = np.zeros(T, int), {}, {}
    for t in np.flatnonzero(segments):
        document = segments[t]
        counts = passed.setdefault(document, [0] * N)
        seen[document] = seen.get(document, 0) + 1
        for r in range(int(np.argmax(logits[t] + bias)) + 1):
            if counts[r] >= int(SHARES[r] * seen[document] + 1e-9):
                break
            counts[r] += 1
            depth[t] += 1
    return depth


@pytest.mark.parametrize("config", [DepthChoice(losses=(SwitchLoss(0.1),)), DepthChoice("sigmoid", 5, 0.5, ())],
                         ids=["softmax", "sigmoid"])
def test_against_loop(float64, config):
    made, x = module(MixtureOfRecursions(BLOCK, N, router=config)), stream()
    unit = jax.jit(lambda x, tokens: made.unit(x, tokens)[0])
    places, h, first = np.asarray(tokens_of(SEGMENTS).positions), np.array(x), np.asarray(x)
    up, out = made.router.router.up, np.asarray(made.router.router.out[...])
    logits = first @ out if up is None else np.asarray(jax.nn.gelu(first @ np.asarray(up[...]))) @ out
    soft = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    gates = soft if config.score == "softmax" else 1 / (1 + np.exp(-logits))
    depth = np.stack([chosen_depths(logits[row], SEGMENTS[row]) for row in range(B)])
    for row in range(B):
        for r in range(N):
            at = np.flatnonzero(depth[row] > r)
            front = lambda a: np.concatenate([a[row, at], np.zeros((T - len(at), *a.shape[2:]), a.dtype)])[None]
            y = np.asarray(unit(front(h), Tokens(front(SEGMENTS), front(places))))[0]
            for t, made_of in zip(at, y):
                last = depth[row, t] == r + 1
                h[row, t] = first[row, t] + config.scale * gates[row, t, r] * made_of if last else made_of
    y, _, aux = jax.jit(lambda x: made(x, tokens_of(SEGMENTS)))(x)
    assert set(depth[SEGMENTS > 0]) == {1, 2, 3}
    np.testing.assert_array_equal(aux.traces["depth"], depth)
    np.testing.assert_allclose(y, h, rtol=1e-9, atol=1e-9)
    wanted = np.bincount(logits[SEGMENTS > 0].argmax(-1), minlength=N) / (SEGMENTS > 0).sum()
    np.testing.assert_allclose(aux.traces["router/load"], wanted)
    if config.losses:
        balance = N * (wanted * soft[SEGMENTS > 0].mean(0)).sum()
        np.testing.assert_allclose(aux.losses["router/balance"], 0.1 * balance, rtol=1e-7)


def test_bias_steers_the_choice(float64):
    made, x = module(MixtureOfRecursions(BLOCK, N, router=DepthChoice(losses=(), balance_rate=0.01))), stream()
    made.router.balance[...] = jnp.array([0.0, 0.0, 5.0])
    aux = made(x, tokens_of(SEGMENTS, TRAINING))[2]
    assert aux.traces["router/load"].tolist() == [0, 0, 1]
    real = (SEGMENTS > 0).sum()
    np.testing.assert_allclose(aux.updates["router/balance"], [real / 3, real / 3, real / 3 - real])


@pytest.mark.parametrize("cache", ["recursion", "shared"])
@pytest.mark.parametrize("router", [DepthChoice(), TopTokens()], ids=["token", "expert"])
def test_splits_packing_and_padding(float64, router, cache):
    made, x = module(MixtureOfRecursions(BLOCK, N, router=router, cache=cache, slack=0.2)), stream()
    run = jax.jit(lambda x, tokens, state: made(x, tokens, state))
    tokens, real = tokens_of(SEGMENTS), SEGMENTS > 0
    whole, _, aux = run(x, tokens, None)
    assert len(np.unique(aux.traces["depth"][real])) == 3
    for cuts in ((40,), (19, 1, 1, 19), (1,) * 40):
        through = in_pieces(run, made.init_state(B, T, jnp.float64), x, tokens, cuts)
        np.testing.assert_allclose(through[real], whole[real], rtol=1e-9, atol=1e-9)
    alone, _, _ = run(x[:, 23:36], tokens_of(np.ones((B, 13))), None)
    np.testing.assert_allclose(whole[:, 23:36], alone, rtol=1e-9, atol=1e-9)


def test_shared_keys_against_loop(float64):
    """Queries of the chosen, keys and values of all tokens as the first recursion made them."""
    made, x = module(MixtureOfRecursions(BLOCK, N, router=TopTokens(), cache="shared")), stream()
    tokens = tokens_of(SEGMENTS)
    y, _, aux = jax.jit(lambda x: made(x, tokens))(x)
    attention, mlp = made.unit.layers
    _, k, v = (np.asarray(a) for a in attention.layer.heads(attention.before(x), tokens))
    out, h = np.asarray(attention.layer.out[...]), np.asarray(x)
    for r in range(N):
        q = np.asarray(attention.layer.heads(attention.before(jnp.asarray(h)), tokens)[0])
        read = np.zeros_like(h)
        for row, head, t in np.ndindex(B, 2, T):
            seen = [s for s in range(t + 1) if SEGMENTS[row, s] == SEGMENTS[row, t] > 0]
            if seen:
                scores = np.array([q[row, head, t] @ k[row, head, s] for s in seen]) / np.sqrt(D // 2)
                weights = np.exp(scores - scores.max())
                read[row, t] += (weights / weights.sum()) @ v[row, head, seen] @ out[head]
        unit = mlp(jnp.asarray(h + read), tokens)[0]
        chosen = np.asarray(aux.traces["depth"]) > r
        h = np.where(chosen[:, :, None], h + np.asarray(aux.traces["gate"])[r, :, :, None] * np.asarray(unit), h)
    np.testing.assert_allclose(y, h, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("router", [DepthChoice(), TopTokens()], ids=["token", "expert"])
def test_shared_keys_learn(float64, router):
    """The gradient reaches the first recursion's keys through the later recursions too."""
    made = module(MixtureOfRecursions(BLOCK, N, router=router, cache="shared"))
    tokens = tokens_of(SEGMENTS, TRAINING)
    value = lambda made: (made(stream(), tokens)[0] ** 3).sum()
    gradient = jax.jit(jax.grad(value))(made)
    weight, at, values = made.unit.layers[0].layer.key, (3, 1, 2), []
    before = weight[...]
    for nudge in (1e-5, -1e-5):
        weight[...] = before.at[at].add(nudge)
        values.append(value(made))
    np.testing.assert_allclose(gradient.unit.layers[0].layer.key[...][at], (values[0] - values[1]) / 2e-5, rtol=1e-5)


@pytest.mark.parametrize("unit", [
    Repeat(BLOCK, 2, scan=True), Repeat(BLOCK, 2, scan=False), Recur(BLOCK, 2),
    Sequence(Residual(LowRank(Attention(2), 2), Own(RMSNorm())), Residual(SwiGLU(12))),
], ids=["scanned", "unrolled", "recurring", "own"])
def test_units_that_share_keys(float64, unit):
    """One pass, and one token at a time, with any unit that only attends."""
    config = MixtureOfRecursions(unit, 2, cache="shared", slack=0.5)
    config.check(D)
    made, x = module(config), stream(6)
    run = jax.jit(lambda x, tokens, state: made(x, tokens, state))
    tokens = tokens_of(np.ones((B, 6)))
    whole = run(x, tokens, None)[0]
    through = in_pieces(run, made.init_state(B, 6, jnp.float64), x, tokens, (3, 1, 1, 1))
    np.testing.assert_allclose(through, whole, rtol=1e-9, atol=1e-9)


def test_shared_cache_is_a_third(float64):
    length = 30
    size_of = lambda config: sum(a.size for a in jax.tree.leaves(jax.eval_shape(
        lambda: module(config).init_state(B, length).units)) if a.ndim == 4)
    full = size_of(MixtureOfRecursions(BLOCK, N, (1.0, 1.0, 1.0)))
    assert size_of(MixtureOfRecursions(BLOCK, N, cache="shared")) == full / N
    assert size_of(MixtureOfRecursions(BLOCK, N)) == full * (N + 1) / (2 * N)
    assert size_of(MixtureOfRecursions(BLOCK, N, slack=0.5)) == full * (1 + 1 + 0.5) / N


def test_only_the_last_token_recurs(float64):
    """A prompt whose last logits alone are wanted: no other token goes beyond the first recursion, and nothing changes.
    """
    body = MixtureOfRecursions(BLOCK, N, router=DepthChoice(), cache="shared")
    model = cast(jittered(LanguageModel(16, D, body).build(nnx.Rngs(0)), 2, 0.3), jnp.float64)
    ids = jax.random.randint(jax.random.key(5), (B, T), 0, 16)
    segments = np.ones((B, T), np.int32)
    segments[1, 31:] = 0
    run = jax.jit(lambda how: (lambda out: (out.logits, out.state, out.aux.traces))(
        model(ids, model.init_state(B, T + 4), segment_ids=segments, logits=how)), static_argnums=0)
    (every, state, _), (last, lean, _) = run("all"), run("last")
    ends = np.array([T - 1, 30])
    np.testing.assert_allclose(last[:, 0], every[np.arange(B), ends], rtol=1e-9, atol=1e-9)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(lean), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    cost = lambda how: count(lambda m: m(ids, m.init_state(B, T), logits=how).hidden, model).matmul
    assert cost("last") < 0.6 * cost("all")


@pytest.mark.parametrize("make, words", [
    (lambda: DepthChoice("tanh"), r"DepthChoice.score = 'tanh'"),
    (lambda: DepthChoice(hidden=0), r"DepthChoice.hidden = 0: must be at least 1"),
    (lambda: DepthChoice(scale=0.0), r"DepthChoice.scale = 0.0: must be positive"),
    (lambda: DepthChoice(balance_rate=-1.0), r"balance_rate = -1.0: must be 0"),
])
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
