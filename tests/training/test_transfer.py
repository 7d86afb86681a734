"""Transfer of the learning rate: factors against hand values, sizes that stay flat, an optimum that stays put."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import archlab
from archlab.analysis.stations import sizes, stations
from archlab.attention.attention import Attention
from archlab.data import Batch
from archlab.experts.moe import MoE
from archlab.layers.alphabet import parameters_of
from archlab.layers.config import from_json
from archlab.layers.contract import Place
from archlab.layers.mlp import MLP
from archlab.layers.positions import SinusoidalPositions
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.layers.weights import merge
from archlab.model import LanguageModel
from archlab.recurrence.mamba import Mamba
from archlab.recurrence.mamba2 import Mamba2
from archlab.recurrence.mamba3 import Mamba3
from archlab.recurrence.mlstm import MLSTM
from archlab.recurrence.rwkv6 import RWKV6
from archlab.training.optimizers import NAMES, Optimizer
from archlab.training.step import parameters
from archlab.training.transfer import rates, transfer
from archlab.training.trials import Fits
from archlab.zoo.mamba import mamba
from archlab.zoo.mixture_of_experts import mixture_of_experts
from archlab.zoo.transformer import transformer


def dense(width, depth=1, **fields):
    """Heads of 16 channels, MLPs of twice the width."""
    model = transformer(width, depth, heads=width // 16, hidden=2 * width, vocab=64)
    return dataclasses.replace(model, **fields)


def layers(width):
    """MLPs alone, which compile quickly."""
    return LanguageModel(64, width, Sequence(Residual(MLP(2 * width)), Residual(MLP(2 * width))))


BASE = dense(32, 2)


def test_rates_against_hand_values():
    """At four times the width matrices sum over four times as much, tables move half as fast, gains as ever."""
    wide = parameters(dense(128, 2, tied=False, head_bias=True))
    found = rates(wide, dense(32, 2, tied=False, head_bias=True))
    block = "body/unit/layers"
    assert found == {
        "embed/table": 0.5, "head/weight": 0.5, "head_bias": 2.0, "norm/scale": 1.0,
        f"{block}/0/before/scale": 1.0, f"{block}/1/before/scale": 1.0,
        **{f"{block}/0/layer/{name}": 0.25 for name in ("query", "key", "value", "out")},
        **{f"{block}/1/layer/{name}": 0.25 for name in ("up", "gate", "down")}}
    assert rates(wide, dense(32, 2, tied=False, head_bias=True), "adafactor") == found


def test_rates_of_a_router_and_of_experts():
    make = lambda width: mixture_of_experts(width, 2, heads=2, hidden=3 * width, experts=4)
    found = rates(parameters(make(96)), make(32))
    experts = {path.split("/")[-1]: rate for path, rate in found.items() if "layers/1/layer" in path}
    assert all(rate == pytest.approx(1 / 3) for rate in experts.values()) and {"up", "gate", "down"} <= set(experts)
    assert any("router" in path for path in found)


def test_rates_of_a_recurrent_layer():
    """The rank of Mamba's step sizes grows with the width and is summed over; convolutions and decays are not."""
    found = {path.split("/")[-1]: rate for path, rate in rates(parameters(mamba(64, 2)), mamba(16, 2)).items()}
    for name in ("into", "gate", "out", "select", "step"):
        assert found[name] == 0.25, name
    for name in ("A_log", "skip", "step_bias", "bias"):
        assert found[name] == 1, name
    assert {rate for path, rate in rates(parameters(mamba(64, 2)), mamba(16, 2)).items() if "conv" in path} == {1.0}


def test_rates_of_muon_are_spectral():
    """lr x rate x 0.2 sqrt(max) is the update's spectral norm; it follows sqrt(columns / rows)."""
    make = lambda width: mixture_of_experts(width, 2, heads=2, hidden=2 * width, experts=4)
    wide, small = parameters(make(128)), parameters(make(32))
    found = rates(wide, make(32), "muon")

    def norm(weight):  # wanted over what Muon gives, up to a constant
        rows, columns = {"D->HK": ((1,), (2, 3)), "D->GK": ((1,), (2, 3)), "HK->D": ((1, 2), (3,)),
                         "D->E": ((1,), (2,)), "ED->F": ((2,), (3,)), "EF->D": ((2,), (3,))}[weight.letters[1:]]
        rows, columns = (np.prod([weight.shape[axis] for axis in axes]) for axes in (rows, columns))
        return np.sqrt(columns / rows) / np.sqrt(max(rows, columns))

    matrices = [path for path, weight in wide.items() if "->" in weight.letters[2:] and "V" not in weight.letters]
    assert len(matrices) == 8
    for path in matrices:
        assert found[path] == pytest.approx(norm(wide[path]) / norm(small[path])), path
    assert found["body/unit/layers/1/layer/up"] == 0.5 and found["embed/table"] == 0.5
    assert found["body/unit/layers/1/layer/router/weight"] == 0.25


@pytest.mark.parametrize("name", NAMES)
def test_updates_shrink_and_decay_does_not(name):
    weights = parameters(dense(128, 2))
    key = iter(jax.random.split(jax.random.key(0), 99))
    values, gradients = ({path: jax.random.normal(next(key), weight.shape) for path, weight in weights.items()}
                         for _ in range(2))

    def updates(gradients, **fields):
        transform = Optimizer(name, clip=0, **fields).build(weights)
        return transform.update(gradients, transform.init(values), values)[0]

    plain, carried = (updates(gradients, weight_decay=0.0, base=base) for base in (None, BASE))
    factors = rates(weights, BASE, name)
    chex.assert_trees_all_close(carried, {path: factors[path] * plain[path] for path in plain}, rtol=1e-6)
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    chex.assert_trees_all_equal(updates(zeros, weight_decay=0.5, base=BASE), updates(zeros, weight_decay=0.5))


def test_transfer_to_the_base_itself_changes_nothing():
    for config in (BASE, archlab.get_config("universal-transformer-nano")):
        assert transfer(config, config) == config
    model = transfer(dense(64, 8), BASE)
    assert transfer(model, BASE) == model
    small = layers(16)
    ours, theirs = (Fits(small, 3, Optimizer(base=base)).fit(1e-2, 0, itertools.repeat(task())).params
                    for base in (small, None))
    chex.assert_trees_all_equal(ours, theirs)


def test_json_round_trip():
    optimizer, model = Optimizer(base=BASE), transfer(dense(64, 8), BASE, 0.5)
    assert from_json(optimizer.to_json()) == optimizer and from_json(model.to_json()) == model


def test_multipliers_of_width():
    base = dataclasses.replace(BASE, embedding_scale=3.0, logit_scale=0.5)
    model = transfer(dense(128, 2), base)
    assert (model.embedding_scale, model.logit_scale) == (6.0, 0.25)
    assert transfer(dense(128, 2), BASE).body == dense(128, 2).body  # depth is the same
    places = lambda width, scale: LanguageModel(64, width, Sequence(SinusoidalPositions(scale=scale), BASE.body))
    assert transfer(places(128, 0.1), places(32, 0.2)).body.layers[0].scale == 0.2


def test_scores_of_larger_heads():
    """With as many heads as the base, heads of four times the size: 1/K, equal to K^-1/2 at the base."""
    wide = transfer(transformer(128, 2, heads=2, hidden=256, vocab=64), BASE)
    assert wide.body.unit.layers[0].layer.scale == pytest.approx(16**-0.5 * 16 / 64)
    assert transfer(dense(128, 2), BASE).body.unit.layers[0].layer.scale is None


@pytest.mark.parametrize("power, scale, rate", [(1.0, 0.25, 1.0), (0.5, 0.5, 0.5), (0, 1.0, 1.0)])
def test_depth(power, scale, rate):
    """Four times as deep: branches are scaled, their rates follow, and outputs are drawn as in the base."""
    model = transfer(dense(32, 8), BASE, power)
    block = model.body.unit.layers[1]
    assert (block.scale, block.rate, block.spread) == (scale, rate, 4 if power else None)
    inside = {weight.rate for path, weight in parameters(model).items() if path.startswith("body")}
    assert inside == {rate} and parameters(model)["embed/table"].rate == parameters(model)["norm/scale"].rate == 1


@pytest.mark.parametrize("layer", [Attention(2), MLP(64), MoE(4, 16), Mamba(), Mamba2(state=8, head_size=8),
                                   Mamba3(state=8, head_size=8), MLSTM(2)], ids=lambda layer: type(layer).__name__)
def test_outputs_are_drawn_as_in_the_base(layer):
    """Of 16 branches, spread over 4: as in a network of 4, and larger than in one of 16 by the layer's own rule."""
    weights = lambda depth, **fields: parameters_of(Residual(layer, **fields).build(nnx.Rngs(0), Place(32, 0, depth)))
    ours, base, standard = weights(16, spread=4), weights(4), weights(16)
    chex.assert_trees_all_equal(*({path: w.get_value() for path, w in side.items()} for side in (ours, base)))
    [out] = [path for path in ours if path in ("layer/out", "layer/down")]
    ratio = float(ours[out].get_value().std() / standard[out].get_value().std())
    assert ratio == pytest.approx(4 if isinstance(layer, MLSTM) else 2)


def test_layers_that_know_their_number_keep_it():
    """Initial values that go by the place in the network are those of the deep one, however outputs are spread."""
    place = Place(32, 6, 8)
    plain, spread = (parameters_of(Residual(RWKV6(head_size=8), spread=n).build(nnx.Rngs(0), place)) for n in (None, 2))
    chex.assert_trees_all_equal(*({path: w.get_value() for path, w in side.items()} for side in (plain, spread)))


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="body.unit.layer .Mamba."):
        transfer(mamba(64, 2), BASE)
    with pytest.raises(ValueError, match="query_bias"):
        transfer(transformer(64, 2, 4, 128, bias=True), BASE)
    with pytest.raises(ValueError, match="only the base has: head/weight"):
        Optimizer(base=dataclasses.replace(BASE, tied=False)).build(parameters(dense(64, 2)))
    with pytest.raises(ValueError, match="depth_power = 0.2"):
        transfer(dense(64, 2), BASE, 0.2)
    bare = lambda n: LanguageModel(64, 32, Repeat(MLP(32), n))
    assert transfer(bare(3), bare(3)) == bare(3)


def task(rows=8, length=16):
    """Random letters, to be learnt by heart."""
    ids = np.random.default_rng(0).integers(0, 64, (rows, length + 1)).astype(np.int32)
    ones = np.ones((rows, length))
    return Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.int32), ones.astype(np.float32))


def moved(config, base, name, steps=4):
    """How far stream, branches and logits move in a few steps."""
    optimizer = Optimizer(name, schedule="constant", warmup=0.0, base=base)
    fits, seen = Fits(config, steps, optimizer), []
    look = jax.jit(lambda params, rest: stations(merge(fits.structure, params, rest), task().ids))
    for rate in (0.0, 2**-8):
        fit = fits.fit(max(rate, 1e-30), 0, itertools.repeat(task()))
        seen.append(look(fit.params, fit.rest))
    return {name: change for name, (_, change) in sizes(*seen).items()}


@pytest.mark.parametrize("name, grows", [("adamw", 1.6), ("muon", 1.4)])
def test_coordinates_are_flat_over_width(name, grows):
    """From width 64 to 256: with transfer all moves as far, without it the stream moves further."""
    base, wide = dense(64), dense(256)
    small, standard, carried = (moved(*of, name) for of in ((base, None), (wide, None), (transfer(wide, base), base)))
    for station, most in {"embedding": 1.2, "stream": 1.4, "branches": 1.4, "logits": 2}.items():
        assert 1 / most < carried[station] / small[station] < most, (station, carried, small)
    assert standard["stream"] / small["stream"] > grows, (standard, small)


def test_the_best_rate_stays_over_width():
    """The rate that learns most by heart in 20 steps, of powers of two: that of width 16 at width 128, too, give
    or take one, with transfer; without it at most a quarter of it."""
    base, powers = layers(16), np.arange(-9, -1)

    def best(config, base):
        fits = Fits(config, 20, Optimizer(schedule="constant", warmup=0.0, weight_decay=0.0, base=base))
        losses = []
        for power in powers:
            last = []
            fits.fit(2.0**power, 0, itertools.repeat(task()), lambda step, loss: last.append(loss))
            losses.append(last[-1] if np.isfinite(last[-1]) else np.inf)
        i = int(np.argmin(losses))
        assert 0 < i < len(powers) - 1, losses
        return powers[i]

    tuned = best(base, None)
    assert abs(best(transfer(layers(128), base), base) - tuned) <= 1
    assert best(layers(128), None) <= tuned - 2


def test_stations_add_up():
    model = nnx.clone(BASE.build(nnx.Rngs(0)))
    ids = jnp.asarray(task().ids)
    found = jax.jit(stations)(model, ids)
    branches = [value for name, value in found.items() if name.startswith("branch ")]
    assert len(branches) == 4
    chex.assert_trees_all_close(found["embedding"] + sum(branches), found["stream"], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(found["logits"], model(ids).logits, rtol=1e-5, atol=1e-5)
    changed = sizes(found, {name: 2 * value for name, value in found.items()})
    size = float(jnp.sqrt(jnp.mean(found["stream"] ** 2)))
    assert changed["stream"] == pytest.approx((2 * size, size), rel=1e-5)
