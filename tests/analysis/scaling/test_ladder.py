"""One dial: what follows from a size, against the formulas."""

import dataclasses
import math

import pytest

import archlab
from archlab.analysis.accounts import count_parameters
from archlab.analysis.scaling.ladder import at_size, resize, rungs, sizes_around
from archlab.attention.attention import Attention
from archlab.training.optimizers import Optimizer

CONTEXT = 256


@pytest.mark.parametrize("name", ["transformer-tiny", "mixture-of-experts-tiny", "mamba2-tiny", "gemma3-tiny",
                                  "mixture-of-recursions-tiny"])
def test_any_architecture_at_any_size(name):
    model = archlab.get_config(name)
    for size in (3e4, 3e5):
        found = at_size(model, size)
        assert count_parameters(found).active_body == pytest.approx(size, rel=0.25)
        assert found.vocab == model.vocab and type(found.body) is type(model.body)


def test_depth_and_width_grow_alike_and_heads_keep_their_size():
    model = archlab.get_config("transformer-tiny")  # 128 wide, 6 deep, heads of 32, 1.19 M
    found = at_size(model, 8 * count_parameters(model).active_body)
    assert (found.width, found.body.n) == (256, 12)
    heads = next(c for _, c in found.walk() if isinstance(c, Attention)).heads
    assert found.width // heads == 32
    assert at_size(model, count_parameters(model).active_body) == model


def test_resize():
    model = archlab.get_config("mixture-of-experts-tiny")
    found = resize(model, 2 * model.width, depth=2)
    assert found.width == 2 * model.width and found.body.n == 2
    assert resize(model, model.width, model.body.n) == resize(model, model.width) == model
    with pytest.raises(ValueError, match="heads"):
        resize(archlab.get_config("transformer-tiny"), 100)


def test_what_follows_from_the_size():
    small, large = rungs("t", archlab.get_config("transformer-tiny"), [8e5, 1e5], CONTEXT)
    assert (small.size, large.size) == (1e5, 8e5)
    assert (small.batch, large.batch) == (8, 16)  # 4096 (N / 10^6)^(1/3) / 256 = 7.4 and 14.9
    assert small.learning_rate == pytest.approx(2 * large.learning_rate) == pytest.approx(0.003 * 10 ** (1 / 3))
    assert small.flops_per_token == pytest.approx(archlab.profile(small.model, CONTEXT).training.total)
    assert small.N["counted"] * 6 == small.flops_per_token and small.layers == small.model.body.n


def test_runs_of_a_size_share_their_trunk():
    rung, = rungs("t", archlab.get_config("transformer-tiny"), [1e5], CONTEXT)
    budgets = [1e11, 3e11, 9e11]
    runs = [rung.run(budget, budgets[0], factor=2.0, seed=3) for budget in budgets]
    for shorter, longer, budget in zip(runs, runs[1:], budgets):
        assert shorter.tokens * rung.flops_per_token == pytest.approx(budget, rel=0.01)
        rates = shorter.optimizer.rate(shorter.steps), longer.optimizer.rate(longer.steps)
        assert all(rates[0](i) == rates[1](i) for i in range(shorter.branches_at))
        assert rates[0](shorter.branches_at + 1) < rates[1](shorter.branches_at + 1)
    first = runs[0]
    assert first.optimizer.learning_rate == 2 * rung.learning_rate and first.seed == 3
    assert first.branches_at == first.steps - round(0.2 * first.steps)
    warmup = round(first.optimizer.warmup * first.steps)
    assert warmup == min(round(1e5 / 2048), round(0.1 * first.steps))
    assert first.optimizer.rate(first.steps)(first.steps) == 0


def test_transfer_takes_the_smallest_sizes_rate_over():
    small, large = rungs("t", archlab.get_config("transformer-tiny"), [1e5, 8e5], CONTEXT, "completep")
    assert small.learning_rate == large.learning_rate and large.base == small.base
    assert large.run(1e12, 1e12).optimizer.base == at_size(archlab.get_config("transformer-tiny"), 1e5)
    assert large.model != at_size(archlab.get_config("transformer-tiny"), 8e5)  # branches and logits are scaled
    plain = dataclasses.replace(large.run(1e12, 1e12).optimizer, base=None)
    assert isinstance(plain, Optimizer)
    with pytest.raises(ValueError, match="transfer = 'muP'"):
        rungs("t", archlab.get_config("transformer-tiny"), [1e5], CONTEXT, "muP")


def test_sizes_for_budgets_enclose_the_rule_of_thumb():
    budgets = [1e17, 1e19]
    sizes = sizes_around(budgets)
    assert sizes == sorted(sizes)
    for budget in budgets:
        best = math.sqrt(budget / 120)
        assert sum(size < best * 0.999 for size in sizes) >= 2 and sum(size > best * 1.001 for size in sizes) >= 2
    assert all(b / a == pytest.approx(2, rel=0.2) for a, b in zip(sizes, sizes[1:]))


def test_bad_sizes():
    with pytest.raises(ValueError, match="size = -1"):
        at_size(archlab.get_config("transformer-tiny"), -1)
    with pytest.raises(ValueError, match="give the same model"):
        rungs("t", archlab.get_config("transformer-tiny"), [1e5, 1.001e5], CONTEXT)
