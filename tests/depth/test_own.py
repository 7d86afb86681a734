"""What each recursion owns: held once for each, and applied as if the recursions were written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.attention.attention import Attention
from archlab.depth.own import LowRank, Own, join_updates, of_recursion, recurring
from archlab.depth.recur import Recur
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.alphabet import parameters_of, variables_of
from archlab.layers.contract import Place
from archlab.layers.mlp import MLP, SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat, unstack
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from tests.helpers import cast, in_pieces, jittered, tokens_of

B, T, D, F, N = 2, 6, 8, 12, 3
RELAXED = Residual(LowRank(SwiGLU(F), 2), Own(RMSNorm()))


def built(config, seed=0):
    return config.build(nnx.Rngs(seed), Place(D, 0, config.branches))


def module(config, seed=0):
    return cast(jittered(built(config, seed), seed + 1), jnp.float64)


def stream(seed=3):
    return jax.random.normal(jax.random.key(seed), (B, T, D), jnp.float64)


def values(made):
    return {path: np.asarray(p[...]) for path, p in parameters_of(made).items()}


def relaxed_layer(h, w, i):
    """The unit `RELAXED` at a recursion, from its paper: every matrix with its own low-rank term, its own norm."""
    matrices = {}
    for j, name in enumerate(("down", "gate", "up")):
        low = w[f"unit/layer/down/{j}"][i] @ w[f"unit/layer/up/{j}"][i]
        matrices[name] = w[f"unit/layer/layer/{name}"] + low
    normed = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * w["unit/before/scale"][i]
    gate = normed @ matrices["gate"]
    return h + (gate / (1 + np.exp(-gate)) * (normed @ matrices["up"])) @ matrices["down"]


@pytest.mark.parametrize("scan", [False, True])
def test_relaxed_recursion_against_loop(float64, scan):
    made, tokens = module(Recur(RELAXED, N, scan=scan)), tokens_of(np.ones((B, T)))
    h, w = np.asarray(stream()), values(made)
    for i in range(N):
        h = relaxed_layer(h, w, i)
    np.testing.assert_allclose(jax.jit(lambda m: m(stream(), tokens)[0])(made), h, rtol=1e-9, atol=1e-11)
    gradient = values(jax.jit(jax.grad(lambda m: (m(stream(), tokens)[0] ** 3).sum()))(made))
    assert all((gradient[name].reshape(N, -1) != 0).any(1).all() for name in ("unit/before/scale", "unit/layer/up/1"))


def test_what_is_held():
    """Own copies have an axis L and are used once, the rest is used by all recursions; corrections begin at nothing."""
    parameters = parameters_of(built(Recur(RELAXED, N)))
    said = {path: (p.shape, p.letters, p.uses) for path, p in parameters.items()}
    assert said["unit/before/scale"] == ((N, D), "L->D", 1)
    assert said["unit/layer/down/0"] == ((N, F, 2), "LD->.", 1) and said["unit/layer/up/0"] == ((N, 2, D), "L.->D", 1)
    assert said["unit/layer/layer/up"] == ((D, F), "D->F", N)
    downs = np.asarray(parameters["unit/layer/down/1"][...])
    assert (downs[0] != downs[1]).all() and (downs[1] != downs[2]).all()
    assert not np.asarray(parameters["unit/layer/up/1"][...]).any()
    some = parameters_of(recurring(RELAXED, N, nnx.Rngs(0), Place(D), uses=1.5))
    assert some["before/scale"].uses == 0.5 and some["layer/layer/up"].uses == 1.5


def test_nothing_own_costs_nothing():
    """Paths, shapes and first values are those of the unit alone."""
    unit = Sequence(Residual(Attention(2)), Residual(SwiGLU(F)))
    config = Recur(unit, N)
    plain, made = values(unit.build(nnx.Rngs(0), Place(D, 0, config.branches))), values(built(config))
    assert made.keys() == {f"unit/{path}" for path in plain}
    for path, value in plain.items():
        np.testing.assert_array_equal(made[f"unit/{path}"], value)
    made = built(Recur(unit, N)).unit
    assert of_recursion(made, 1) is made


def test_elsewhere_it_is_its_layer(float64):
    tokens = tokens_of(np.ones((B, T)))
    assert isinstance(built(Own(RMSNorm())), type(built(RMSNorm())))
    for wrapped in (Own(SwiGLU(F)), LowRank(SwiGLU(F), 2)):
        plain = cast(built(SwiGLU(F)), jnp.float64)(stream(), tokens)[0]
        np.testing.assert_allclose(cast(built(wrapped), jnp.float64)(stream(), tokens)[0], plain, rtol=1e-12)
    config = Own(Residual(Attention(2, causal=False)))
    assert config.branches == 1 and not config.causal and not Own(Attention(2)).recurrent
    with pytest.raises(ValueError, match="Attention.heads = 2"):
        Own(Attention(2)).check(9)


def test_copies_within_copies(float64):
    """Own weights of a `Repeat` in a recursion in a `Repeat`: each is another's, and unstacking changes nothing."""
    config = Repeat(Recur(Repeat(RELAXED, 2, scan=False), N, scan=False), 2, scan=False)
    made, tokens = module(config), tokens_of(np.ones((B, T)))
    w = values(made)
    assert w["unit/unit/unit/before/scale"].shape == (2, 2, N, D)
    assert w["unit/unit/unit/layer/layer/up"].shape == (2, 2, D, F)
    h = np.asarray(stream())
    for outer in range(2):
        for i in range(N):
            for copy in range(2):
                layer = {path.removeprefix("unit/unit/"): a[outer, copy] for path, a in w.items()}
                h = relaxed_layer(h, layer, i)
    run = jax.jit(lambda m: m(stream(), tokens)[0])
    np.testing.assert_allclose(run(made), h, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(run(unstack(made)), h, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scan", [False, True])
def test_a_mixer_of_its_own_keeps_its_state(float64, scan):
    made, tokens = module(Recur(Residual(Own(Attention(2))), N, scan=scan)), tokens_of(np.ones((B, T)))
    run = jax.jit(lambda x, tokens, state: made(x, tokens, state))
    through = in_pieces(run, made.init_state(B, T, jnp.float64), stream(), tokens, (3, 1, 2))
    np.testing.assert_allclose(through, run(stream(), tokens, None)[0], rtol=1e-9)


@pytest.mark.parametrize("scan", [False, True])
def test_updates_go_to_the_copies_that_made_them(float64, scan):
    """An update has the shape of its variable: one for each recursion where own, the sum of all where shared."""
    experts = MoE(4, 8, TopK(1, balance_rate=0.1))
    tokens = tokens_of(np.ones((B, T)))
    for unit in (Residual(experts), Residual(Own(experts)), Repeat(Residual(Own(experts)), 2)):
        made = module(Recur(unit, N, scan=scan))
        updates = jax.jit(lambda m: m(stream(), tokens)[2].updates)(made)
        variables = variables_of(made)
        assert updates and all(variables[path].shape == update.shape for path, update in updates.items())
    stacked = {"layer/bias": jnp.arange(6.0).reshape(3, 2)}
    plain = recurring(Residual(MLP(4)), N, nnx.Rngs(0), Place(D))
    np.testing.assert_array_equal(join_updates(plain, stacked)["layer/bias"], [6, 9])


@pytest.mark.parametrize("make, words", [
    (lambda: LowRank(SwiGLU(F), 0), "LowRank.rank = 0: must be at least 1"),
    (lambda: built(LowRank(Repeat(SwiGLU(F), 2), 2)), "has no matrix to correct"),
])
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
