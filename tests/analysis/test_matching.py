"""Matching: the same architecture at the size wanted."""

import dataclasses

import pytest

import archlab
from archlab.analysis.accounts import count_parameters
from archlab.analysis.matching import active_body, match
from archlab.attention.attention import Attention
from archlab.layers.config import LayerConfig
from archlab.layers.mlp import MLP
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


@pytest.mark.parametrize("name, target", [("transformer-tiny", 400_000), ("transformer-tiny", 30_000_000)]
                         + [(name, 2_500_000) for name in archlab.list_models("*-tiny")])
def test_every_architecture_reaches_its_target(name, target):
    config = archlab.get_config(name)
    matched = match(config, target)
    assert count_parameters(matched).active_body == pytest.approx(target, rel=0.03)
    shape = lambda c: [(path, type(part)) for path, part in c.walk()]
    assert shape(matched) == shape(config)


def test_what_matches_already_is_left_alone():
    config = archlab.get_config("transformer-tiny")
    assert match(config, active_body(config) * 1.02) is config


def test_heads_stay_and_hidden_sizes_follow_the_width():
    config = archlab.get_config("transformer-small")
    matched = match(config, 4 * active_body(config))
    attention, mlp = (residual.layer for residual in matched.body.unit.layers)
    assert attention.heads == 6 and matched.body.n == 6 and matched.width % 12 == 0
    assert mlp.hidden / matched.width == pytest.approx(1024 / 384, rel=0.1)
    assert matched.width == pytest.approx(2 * 384, rel=0.05)


def test_hidden_sizes_make_up_for_widths_that_lie_far_apart():
    block = Sequence(Residual(Attention(heads=16)), Residual(MLP(hidden=512)))
    config = LanguageModel(256, 128, Repeat(block, 2))  # rotary heads of even size: widths are multiples of 32
    reached = {}
    for share in (1.1, 1.25, 1.4):
        matched = match(config, share * active_body(config))
        reached[share] = matched.width
        assert active_body(matched) == pytest.approx(share * active_body(config), rel=0.03)
        assert matched.width % 32 == 0
    assert set(reached.values()) <= {128, 160}


class Rigid(LayerConfig):
    """A user's own layer, which takes widths of 64 and 1024 only."""

    def check(self, width):
        if width not in (64, 1024):
            raise ValueError(f"width {width}")

    def build(self, rngs, at):
        return Residual(Attention(4)).build(rngs, at)


def test_the_impossible_is_said_with_what_was_reached():
    config = LanguageModel(256, 64, Rigid())
    with pytest.raises(ValueError, match=r"nearest is [\d,]+ at width (64|1024)"):
        match(config, 300_000)
    with pytest.raises(ValueError, match="target = 0"):
        match(config, 0)


def test_any_measure_will_do():
    config = archlab.get_config("mamba-nano")
    flops = lambda c: archlab.profile(c, context=64).training.total
    assert flops(match(config, 3 * flops(config), flops)) == pytest.approx(3 * flops(config), rel=0.03)
    wider = match(config, 512, lambda c: c.width)
    assert wider == dataclasses.replace(config, width=wider.width) and wider.width == pytest.approx(512, rel=0.03)


def test_few_models_are_measured():
    config, calls = archlab.get_config("transformer-tiny"), []
    match(config, 20e6, lambda c: calls.append(c.width) or active_body(c))
    assert len(calls) == len(set(calls)) <= 12
