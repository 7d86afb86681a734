"""Accounts against closed formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import archlab
from archlab.analysis.accounts import abstract, count_parameters, short
from archlab.analysis.flops import count
from archlab.attention import attention
from archlab.attention.blocks import GROUPS
from archlab.attention.core import attend_plain
from archlab.experts.capacity import Capacity
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.alphabet import parameters_of
from archlab.layers.repeat import Repeat, Shared


def test_transformer_matmuls_follow_the_closed_formula():
    T, D, F, L, V = 4096, 128, 344, 6, 256
    stretch = T // GROUPS  # of queries, each of which meets all keys up to the end of its stretch
    weights = L * (4 * D * D + 3 * D * F)
    profile = archlab.profile("transformer-tiny", context=T)
    scores = L * 2 * D * (T + stretch) / 2
    assert profile.forward.matmul == pytest.approx(2 * (weights + scores + D * V), rel=0.01)
    assert profile.training.matmul == pytest.approx(3 * profile.forward.matmul)
    assert profile.decode.matmul == pytest.approx(2 * (weights + L * 2 * D * T + D * V), rel=0.01)
    assert profile.parameters.total == weights + L * 2 * D + D + V * D
    assert profile.state_bytes == L * (2 * T * D * 4 + 2 * T * 4 + 4) + 12


def test_mamba_matmuls_and_scan_follow_the_closed_formula():
    T, D, L, V, N, R = 1024, 128, 10, 256, 16, 8
    F = 2 * D
    weights = L * (3 * D * F + F * (R + 2 * N) + R * F)
    profile = archlab.profile("mamba-tiny", context=T)
    assert profile.forward.matmul == pytest.approx(2 * (weights + L * F * N + D * V), rel=0.01)  # C h is a product
    assert profile.decode.matmul == pytest.approx(profile.forward.matmul, rel=0.01)
    scan = L * F * N * 5  # exp(dt A): 2, decay h + B (dt x): 3
    assert scan < profile.forward.elementwise < 2 * scan
    assert archlab.profile("mamba-tiny", context=8 * T).state_bytes == profile.state_bytes
    assert archlab.profile("mamba-tiny", context=8 * T).decode == profile.decode


@pytest.mark.parametrize("name", ["transformer-nano", "mamba-nano"])
def test_training_is_the_real_gradient_without_recomputation(name, monkeypatch):
    monkeypatch.setattr(jax, "checkpoint", lambda fn, **_: fn)
    monkeypatch.setattr(attention, "attend", lambda q, k, v, places, rules: attend_plain(
        q, k, v, places, places, rules))
    context, model = 128, abstract(archlab.get_config(name))
    structure, weights = nnx.split(model)
    ids = jax.ShapeDtypeStruct((1, context), jnp.int32)

    def loss(weights, ids):
        model = nnx.merge(structure, weights)
        return model.losses(model(ids, logits="none").hidden, ids).mean()

    gradient, profile = count(jax.grad(loss), weights, ids) / context, archlab.profile(name, context)
    # A scan's gradient sums by products what the forward pass does element by element: a few per cent of one so small.
    assert profile.training.matmul == pytest.approx(gradient.matmul, rel=0.03 if name == "mamba-nano" else 0.01)
    assert profile.training.elementwise == pytest.approx(gradient.elementwise, rel=0.35)


def test_accounts_are_those_of_the_real_model():
    @jax.jit
    def make():
        model = archlab.create_model("mamba-nano", nnx.Rngs(0))
        return {path: weight[...] for path, weight in parameters_of(model).items()}, model.init_state(2, 64)

    weights, state = make()
    profile = archlab.profile("mamba-nano", 64, batch=2)
    assert profile.parameters.total == sum(weight.size for weight in weights.values())
    assert profile.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", archlab.list_models("*-nano"))
def test_every_architecture_has_accounts(name):
    profile = archlab.profile(name, context=64)
    p = profile.parameters
    assert 0 < p.embedding and 0 < p.active_body <= p.total - p.embedding and p.active <= p.applied
    assert 0 < profile.decode.matmul and profile.forward.matmul < profile.training.matmul


def test_shared_weights_count_once_and_apply_every_time():
    config = archlab.get_config("transformer-nano")
    unit = config.body.unit
    tied = dataclasses.replace(config, body=Repeat(Shared(unit), 6))
    once, six = (count_parameters(dataclasses.replace(config, body=Repeat(unit, n))) for n in (1, 6))
    shared = count_parameters(tied)
    assert shared.total == shared.unique == shared.active == once.total
    assert shared.applied == six.applied == six.total
    untied = dataclasses.replace(config, body=Repeat(unit, 6))
    assert archlab.profile(tied, 64).forward == archlab.profile(untied, 64).forward


@pytest.mark.parametrize("capacity_factor", [None, 1.25])
def test_experts_count_by_how_many_each_token_goes_to(capacity_factor):
    T, D, F, L, V, E, k = 1024, 128, 256, 6, 256, 16, 2
    moe = MoE(E, F, TopK(k, renormalise=True), capacity_factor and Capacity(capacity_factor))
    config = archlab.get_config("transformer-tiny").set("body.unit.layers.1.layer", moe)
    profile, p = archlab.profile(config, T), count_parameters(config)
    dense = L * (4 * D * D + D * E + 2 * D) + D
    experts = L * 3 * D * F
    assert p.total == dense + E * experts + V * D
    assert p.active == p.applied == dense + k * experts + V * D
    attention = L * (4 * D * D + D * E + D * (T + 128))
    assert profile.forward.matmul == pytest.approx(2 * (attention + k * experts + D * V), rel=0.01)
    trained = attention + k * (capacity_factor or 1) * experts + D * V  # a buffer's empty rows are multiplied too
    assert profile.training.matmul == pytest.approx(6 * trained, rel=0.01)
    assert profile.decode.matmul == pytest.approx(2 * (attention + L * D * (T - 128) + k * experts + D * V), rel=0.01)


def test_rows_that_share_a_capacity():
    """Any number of rows: the probe is a multiple of it."""
    of = lambda rows: MoE(4, 32, TopK(1), Capacity(1.0, rows=rows))
    config = archlab.get_config("transformer-nano")
    flops = [archlab.profile(config.set("body.unit.layers.1.layer", of(rows)), 64).training.matmul for rows in (1, 3)]
    assert flops[0] == pytest.approx(flops[1], rel=0.02)


def test_recurrent_units_count_once_and_apply_at_every_step():
    T, D, F, V, n = 256, 48, 128, 256, 3
    unit, act = 4 * D * D + 3 * D * F + 2 * D, D + 1
    profile = archlab.profile("universal-transformer-nano", T)
    p = profile.parameters
    assert p.total == p.active == unit + act + D + V * D
    assert p.applied == n * (unit + act) + D + V * D
    products = n * (4 * D * D + 3 * D * F + D + D * (T + 128)) + D * V
    assert profile.forward.matmul == pytest.approx(2 * products, rel=0.01)


def test_recursions_for_fewer_tokens_cost_less():
    config = archlab.get_config("mixture-of-recursions-tiny")
    by = lambda capacities: archlab.profile(config.set("body.layers.1.capacities", capacities), 256)
    full, less = by((1.0, 1.0, 1.0)), by((1.0, 0.5, 0.25))
    unit = full.parameters.applied - full.parameters.total
    assert unit * 1.75 / 3 < unit and less.parameters.total == full.parameters.total
    assert less.parameters.applied - less.parameters.total == pytest.approx(unit * 0.75 / 2, rel=1e-3)
    assert less.training.matmul < 0.7 * full.training.matmul
    assert less.state_bytes < full.state_bytes


def test_neither_the_way_of_repeating_nor_the_dtype_changes_operations():
    config = archlab.get_config("mamba-nano")
    scanned = config.set("body.scan", True)
    assert archlab.profile(config, 64) == archlab.profile(scanned, 64)
    low = archlab.profile(config.set("dtype", "bfloat16"), 64)
    assert low.forward == archlab.profile(config, 64).forward
    assert low.state_bytes < archlab.profile(config, 64).state_bytes


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="transformer-tiny"):
        archlab.profile("transformer-tine")
    with pytest.raises(ValueError, match="context = 0"):
        archlab.profile("mamba-nano", context=0)


def test_the_table_reads_well():
    text = str(archlab.profile("mamba-nano", context=1024))
    assert "FLOPs per token" in text and "state at 1,024 tokens" in text
    assert max(map(len, text.splitlines())) <= 80
    assert [short(n) for n in (0, 999, 1234567, 999_700, 7.9e9)] == ["0", "999", "1.23 M", "1.00 M", "7.90 G"]
    assert [short(n, pad=False) for n in (0.25, 1.2e6, 2e4)] == ["0.25", "1.2 M", "20 k"]
