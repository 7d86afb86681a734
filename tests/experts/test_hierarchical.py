"""Two levels of routing against Shazeer's appendix B, token by token."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.experts.balance import SwitchLoss
from archlab.experts.hierarchical import Hierarchical, balance_within
from archlab.experts.moe import MoE
from archlab.experts.routers import Groups, TopK
from archlab.layers.contract import Place
from tests.helpers import cast, tokens_of

D, G, M = 6, 3, 4  # M experts in each of G groups
SEGMENTS = np.array([[1] * 9, [1] * 3 + [2] * 2 + [0] * 4])


def level(rule, logits):
    """The choice and its weights by one level's convention; all gates."""
    gates = np.exp(logits) / np.exp(logits).sum() if rule.score == "softmax" else 1 / (1 + np.exp(-logits))
    chosen = np.argsort(-gates)[: rule.k]
    total = gates[chosen].sum() if rule.renormalise else 1
    return chosen, gates / total * rule.scale, gates / gates.sum()


@pytest.mark.parametrize("outer, inner", [
    (TopK(2, renormalise=True), TopK(2, renormalise=True)), (TopK(1), TopK(3)),
    (TopK(2, "sigmoid", scale=2.0), TopK(2, "sigmoid", True, 1.5))], ids=str)
def test_against_a_slow_loop(float64, outer, inner):
    config = Hierarchical(G, outer, inner, balance=(0.5, 0.25))
    module = cast(config.build(nnx.Rngs(0), Place(D), G * M, 1.0), jnp.float64)
    x = jax.random.normal(jax.random.key(1), (2, 9, D))
    routing = jax.jit(lambda m, x: m(x, tokens_of(SEGMENTS)))(module, x)
    groups, logits = (np.asarray(x) @ np.asarray(w[...]) for w in (module.groups, module.weight))
    chosen_groups, mass = np.zeros(G), np.zeros(G)
    chosen, share, went = np.zeros((G, M)), np.zeros((G, M)), np.zeros(G)
    for b, t in zip(*np.nonzero(SEGMENTS)):
        best, weights, probs = level(outer, groups[b, t])
        mass += probs
        want = {}
        for g in best:
            chosen_groups[g] += 1
            within = level(inner, logits[b, t, g * M : (g + 1) * M])
            went[g] += 1
            share[g] += within[2]
            for e in within[0]:
                chosen[g, e] += 1
                want[g * M + e] = weights[g] * within[1][e]
        got = dict(zip(routing.experts[b, t].tolist(), routing.weights[b, t].tolist()))
        assert got.keys() == want.keys() and list(got.values()) == sorted(got.values(), reverse=True)
        np.testing.assert_allclose([got[e] for e in want], list(want.values()), rtol=1e-9)
        whole = np.concatenate([p * level(inner, logits[b, t, g * M : (g + 1) * M])[2] for g, p in enumerate(probs)])
        np.testing.assert_allclose(routing.probs[b, t], whole, rtol=1e-9)
    real = SEGMENTS.astype(bool).sum()
    balance = G * (chosen_groups / chosen_groups.sum() * mass / real).sum()
    costs = [M * (chosen[g] / chosen[g].sum() * share[g] / went[g]).sum() for g in range(G) if went[g]]
    np.testing.assert_allclose(routing.aux.losses["group_balance"], 0.5 * balance, rtol=1e-9)
    np.testing.assert_allclose(routing.aux.losses["balance_within"], 0.25 * np.mean(costs), rtol=1e-9)
    np.testing.assert_allclose(config.weigh(routing.gates, routing.experts), routing.weights)


def test_balance_closed_forms():
    """Even: 1 on both levels. All in one group, evenly: G and 1. Evenly over groups, one expert in each: 1 and M."""
    rule, real = Hierarchical(G, TopK(1), TopK(1)), jnp.ones((1, G * M), bool)

    @jax.jit
    def costs(groups, logits):
        _, outer, inner = rule(groups, logits)
        return jnp.stack([SwitchLoss()(outer, real), balance_within(outer, inner, real)])

    every_group = 100.0 * jnp.repeat(jnp.eye(G), M, axis=0)[None]
    every_expert = 100.0 * jnp.tile(jnp.eye(M), (G, G))[None]
    one_group = jnp.broadcast_to(100.0 * jnp.eye(G)[1], (1, G * M, G))
    one_expert = jnp.broadcast_to(100.0 * jnp.tile(jnp.eye(M)[2], G), (1, G * M, G * M))
    np.testing.assert_allclose(costs(every_group, every_expert), [1, 1], rtol=1e-5)
    np.testing.assert_allclose(costs(one_group, every_expert), [G, 1], rtol=1e-5)
    np.testing.assert_allclose(costs(every_group, one_expert), [1, M], rtol=1e-5)


def test_one_group_is_one_level():
    """With one group, or with groups of one expert, the other level decides alone."""
    logits = jax.random.normal(jax.random.key(0), (2, 5, 6))
    for outer, inner, groups in [(TopK(1), TopK(2, renormalise=True), 1), (TopK(2, renormalise=True), TopK(1), 6)]:
        zeros = jnp.zeros((2, 5, 1 if groups == 1 else 6))
        args = (zeros, logits) if groups == 1 else (logits, zeros)
        routing, plain = jax.jit(Hierarchical(groups, outer, inner))(*args)[0], TopK(2, renormalise=True)(logits)
        np.testing.assert_array_equal(routing.experts, plain.experts)
        np.testing.assert_allclose(routing.weights, plain.weights, rtol=1e-6)


@pytest.mark.parametrize("fields, named", [
    (dict(groups=5), "Hierarchical.groups = 5: must divide the number of experts, 12"),
    (dict(groups=1), "Hierarchical.outer = .*k must be at most groups = 1"),
    (dict(groups=6, inner=TopK(3)), "Hierarchical.inner = .*k = 3: each of 6 groups has 2 experts"),
    (dict(groups=4, outer=TopK(2, jitter=0.1)), "Hierarchical.outer = .*for a router of one level"),
    (dict(groups=4, inner=TopK(1, groups=Groups(2, 1))), "count = 2 must divide the number of experts, 3"),
    (dict(groups=4, balance=(0.1, -0.1)), "Hierarchical.balance = "),
])
def test_bad_fields(fields, named):
    with pytest.raises(ValueError, match=named):
        MoE(12, 8, Hierarchical(**fields))


def test_all_groups_are_found():
    """The numbering of experts: group g's are g M to g M + M - 1."""
    rule = jax.jit(Hierarchical(G, TopK(1), TopK(1)))
    for g, e in itertools.product(range(G), range(M)):
        groups, logits = jnp.zeros((1, 1, G)).at[..., g].set(5.0), jnp.zeros((1, 1, G * M)).at[..., g * M + e].set(5.0)
        assert rule(groups, logits)[0].experts.item() == g * M + e
