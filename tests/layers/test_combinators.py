"""The algebra: what each combinator does to values, states, keys of aux, random numbers and weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.attention.attention import Attention
from archlab.layers.config import LayerConfig
from archlab.layers.contract import Aux, Layer, Place, Training
from archlab.layers.mlp import MLP, SwiGLU
from archlab.layers.norms import LayerNorm, RMSNorm
from archlab.layers.repeat import Repeat, Shared, stack, unstack
from archlab.layers.residual import Residual
from archlab.layers.sequence import Identity, Parallel, Provide, Sequence
from archlab.layers.weights import split
from archlab.recurrence.mamba import Mamba
from tests.helpers import jittered, tokens_of

D = 16
TOKENS = tokens_of(jnp.ones((2, 5)))
TRAINING = tokens_of(jnp.ones((2, 5)), Training(jax.random.key(3), jnp.int32(0)))


@jax.jit
def run(module, x, tokens=TOKENS, state=None):
    return module(x, tokens, state)


def make(config, index=0, depth=4):
    return jittered(jax.jit(lambda: config.build(nnx.Rngs(0), Place(D, index, depth)))())


def stream(seed=0, length=5):
    return jax.random.normal(jax.random.key(seed), (2, length, D))


class Spy(LayerConfig):
    """Adds its place; says all that a layer can say."""

    def build(self, rngs, at):
        return SpyModule(at)


class SpyModule(Layer):
    def __init__(self, at):
        self.place = nnx.Variable(jnp.asarray(at.index, jnp.float32))

    def __call__(self, x, tokens, state=None):
        seen = tokens.provided.get("early", jnp.zeros(()))
        said = Aux({"cost": self.place[...]}, {"seen": seen.sum()}, {"place": jnp.float32(1)})
        return x + self.place[...], None, said


def test_residual_places_its_norms():
    layer, x = MLP(24), stream()
    for config in (Residual(layer), Residual(layer, before=None, outer=LayerNorm()),
                   Residual(layer, after=RMSNorm(), scale=0.5)):
        module = make(config)
        inner = lambda h: module.layer(h, TOKENS)[0]
        y = inner(x if module.before is None else module.before(x))
        y = y if module.after is None else module.after(y)
        want = x + config.scale * y
        want = want if module.outer is None else module.outer(want)
        np.testing.assert_allclose(module(x, TOKENS)[0], want, rtol=1e-6)


class Wrong(LayerConfig):
    """A layer that forgets a part of the contract."""

    says: object

    def build(self, rngs, at):
        module = Identity().build(rngs, at)
        call = lambda _, x, tokens, state=None: self.says(x)
        module.__class__ = type("WrongModule", (type(module),), {"__call__": call})
        return module


@pytest.mark.parametrize("says, words", [(lambda x: (x, None), "WrongModule must return y, state, aux"),
                                         (lambda x: (x[:, -1:], None, Aux()), "it must be")])
def test_residual_tells_of_wrong_layers(says, words):
    with pytest.raises(ValueError, match=words):
        Residual(Wrong(says)).build(nnx.Rngs(0), Place(D))(stream(), TOKENS)


def test_dropout_only_in_training_and_keeps_the_mean():
    module, x = make(Residual(MLP(24), dropout=0.5)), stream()
    plain = module(x, TOKENS)[0] - x
    dropped = module(x, TRAINING)[0] - x
    zero = np.asarray(dropped == 0)
    assert 0.3 < zero.mean() < 0.7
    np.testing.assert_allclose(dropped[~zero], 2 * plain[~zero], rtol=1e-4, atol=1e-5)


def test_dropout_differs_between_layers_and_agrees_unrolled_and_scanned():
    unit = Residual(MLP(24), dropout=0.5)
    x = stream()
    pair = make(Sequence(unit, unit))
    masks = [layer(x, TRAINING.fold(i))[0] == x for i, layer in enumerate(pair.layers)]
    assert not np.array_equal(*masks)
    outs = [run(make(Repeat(unit, 3, scan=scan)), x, TRAINING)[0] for scan in (False, True)]
    np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-6)
    repeated = make(Repeat(unit, 3, scan=False))
    masks = [layer(x, TRAINING.fold(i))[0] == x for i, layer in enumerate(repeated.units())]
    assert not np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[1], masks[2])


def test_parallel_combines():
    x, configs = stream(), (MLP(24), SwiGLU(8))
    a, b = (layer(x, TOKENS)[0] for layer in make(Parallel(*configs)).layers)
    np.testing.assert_allclose(make(Parallel(*configs))(x, TOKENS)[0], a + b, rtol=1e-5, atol=1e-6)
    mean = Parallel(*configs, combine="gate").build(nnx.Rngs(0), Place(D))  # gates start equal
    a, b = (layer(x, TOKENS)[0] for layer in mean.layers)
    np.testing.assert_allclose(mean(x, TOKENS)[0], (a + b) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_keys_are_paths_and_nothing_is_lost(scan):
    config = Sequence(Residual(Spy()), Repeat(Sequence(Residual(Spy()), Residual(Spy())), 3, scan=scan))
    module = config.build(nnx.Rngs(0), Place(D, 0, config.branches))
    _, _, aux = module(stream(), TOKENS)
    assert config.branches == 7
    np.testing.assert_array_equal(aux.losses["layers/0/layer/cost"], 0)
    np.testing.assert_array_equal(aux.losses["layers/1/unit/layers/0/layer/cost"], [1, 3, 5])
    np.testing.assert_array_equal(aux.losses["layers/1/unit/layers/1/layer/cost"], [2, 4, 6])
    assert float(aux.loss()) == 21
    assert set(aux.updates) == set(split(module)[2])  # updates name variables of the module


@pytest.mark.parametrize("scan", [False, True])
def test_provide_reaches_what_follows_and_no_further(scan):
    inside = Sequence(Provide("early", Identity()), Repeat(Spy(), 2, scan=scan))
    module = Sequence(inside, Spy()).build(nnx.Rngs(0), Place(D))
    x = stream()
    _, _, aux = module(x, TOKENS)
    np.testing.assert_allclose(aux.traces["layers/0/layers/1/unit/seen"], jnp.full(2, x.sum()), rtol=1e-5)
    assert float(aux.traces["layers/1/seen"]) == 0  # the inner sequence is over


def test_provide_a_trace():
    module = make(Sequence(Provide("steps", Mamba(state=2), trace="step_size"), Identity()))
    assert run(module, stream())[1] is None
    with pytest.raises(ValueError, match="traces are"):
        make(Provide("steps", MLP(8), trace="step_size"))(stream(), TOKENS)


def test_repeat_draws_every_copy_anew_and_scan_equals_unrolled():
    config = Sequence(Residual(Attention(2)), Residual(Mamba(state=4)))
    unrolled, scanned = (make(Repeat(config, 3, scan=scan)) for scan in (False, True))
    weights = split(unrolled)[1]["unit/layers/0/layer/query"]
    assert weights.shape[0] == 3 and not np.allclose(weights[0], weights[1])
    a, b = run(unrolled, stream()), run(scanned, stream())
    np.testing.assert_allclose(a[0], b[0], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(a[2], b[2], rtol=1e-4, atol=1e-5)
    grad = jax.jit(jax.grad(lambda m: (m(stream(), TOKENS)[0] ** 2).sum()))
    grads = [grad(m) for m in (unrolled, scanned)]
    chex.assert_trees_all_close(split(grads[0])[1], split(grads[1])[1], rtol=1e-3, atol=1e-4)


def test_unstack_computes_the_same():
    module = make(Sequence(Repeat(Repeat(Residual(Mamba(state=4)), 2, scan=False), 3, scan=False)))
    apart = unstack(module)
    assert split(apart)[1]["layers/0/unit/2/unit/1/layer/skip"].shape == (2 * D,)
    np.testing.assert_allclose(run(apart, stream())[0], run(module, stream())[0], rtol=1e-6)
    state = module.init_state(2, 5)
    chex.assert_trees_all_equal_shapes(run(apart, stream(), TOKENS, state)[1], state)


@pytest.mark.parametrize("scan", [False, True])
def test_shared_weights_are_held_once_with_corrections_of_their_own(scan):
    block = Residual(SwiGLU(24))
    tied = make(Repeat(Shared(block, lora=2), 3, scan=scan))
    weights = split(tied)[1]
    assert weights["unit/layer/layer/up"].shape == (D, 24) and weights["unit/down/0"].shape == (3, 24, 2)
    x = stream()
    want = x
    for i in range(3):  # the same layer with W + down_i up_i
        at = "unit/layer/layer/"
        layer = {path.removeprefix(at): value for path, value in weights.items() if path.startswith(at)}
        down, gate, up = (layer[name] + weights[f"unit/down/{j}"][i] @ weights[f"unit/up/{j}"][i]
                          for j, name in enumerate(("down", "gate", "up")))
        h = want / jnp.sqrt((want**2).mean(-1, keepdims=True) + 1e-6) * weights["unit/layer/before/scale"]
        want = want + (jax.nn.silu(h @ gate) * (h @ up)) @ down
    np.testing.assert_allclose(run(tied, x)[0], want, rtol=1e-4, atol=1e-5)


def test_stack_finds_prefix_period_and_remainder():
    local, whole, dense = Residual(Attention(2, window=4)), Residual(Attention(2)), Residual(MLP(8))
    config, where = stack([local] * 5 + [whole] + ([local] * 5 + [whole]) * 3 + [local] * 2)  # Gemma 3's 26 layers
    assert config == Sequence(Repeat(Sequence(*[local] * 5, whole), 4), local, local)
    assert where[0] == (0, 0, 0) and where[23] == (0, 3, 5) and where[24:] == [(1, None, 0), (2, None, 0)]
    config, where = stack([dense] + [whole] * 7)  # a dense first layer
    assert config == Sequence(dense, Repeat(Sequence(whole), 7)) and where[7] == (1, 6, 0)
    config, where = stack([dense, whole])
    assert config == Sequence(dense, whole) and where == [(0, None, 0), (1, None, 0)]
