"""Counted operations against formulas written by hand, for every family of the zoo: `closed_formulas` has them."""

import importlib
import pkgutil
import re

import closed_formulas
import jax
import jax.numpy as jnp
import pytest

from archlab import zoo
from archlab.analysis.accounts import training_flops
from archlab.analysis.flops import count
from archlab.layers.contract import Tokens
from archlab.recurrence.diagonal import DiagonalState, diagonal
from archlab.recurrence.long_convolution import long_convolution
from archlab.recurrence.rwkv4 import RWKV4State, weighted_average
from archlab.recurrence.selective_scan import selective_scan

SIZES = {"nano": 512, "tiny": 1024}  # tokens of a text
MODELS = {module.name: [name for name in importlib.import_module(f"archlab.zoo.{module.name}").CONFIGS
                        if re.search("-(nano|tiny)$", name)]
          for module in pkgutil.iter_modules(zoo.__path__)}


def text_for(name: str, config) -> int:
    return min(SIZES[name.rpartition("-")[2]], config.body.longest or 1024)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_products_are_those_of_the_closed_formula(family):
    """A new family fails here until `closed_formulas` knows its layers."""
    assert MODELS[family], f"zoo/{family}.py has no -nano and no -tiny"
    for name in MODELS[family]:
        config = zoo.get_config(name)
        T, D = text_for(name, config), config.width
        counted = training_flops(config, T)
        # Three forward passes, a multiply-add two operations. What is left is rotary angles, the rounding of experts'
        # shares to whole blocks, and what a batch shares: low-rank corrections, the taps of convolutions.
        assert counted.matmul == pytest.approx(6 * closed_formulas.model(config, T), rel=0.01), name
        if name.endswith("-tiny"):
            # Beside products there are recurrences and FFTs, by formula, and what the formulas of no paper count:
            # norms, softmaxes, activations, gates, short convolutions, routing. That is never below nor much.
            more = counted.elementwise - 3 * closed_formulas.elementwise(config.body, D, T)
            assert 0 < more < 0.05 * counted.matmul, name


B, T, F, N = 256, 1024, 32, 16
FLOATS, WAVES, NUMBERS, BOOLS = (lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
                                 for dtype in (jnp.float32, jnp.complex64, jnp.int32, jnp.bool))
TOKENS = Tokens(NUMBERS(B, T), NUMBERS(B, T))


def per_channel(fn, *args):
    return count(fn, *args) / (B * T * F)


def test_a_selective_scan_by_hand():
    scan = per_channel(selective_scan, FLOATS(B, T, F), FLOATS(B, T, F), FLOATS(F, N), FLOATS(B, T, N),
                       FLOATS(B, T, N), BOOLS(B, T), FLOATS(B, F, N))
    assert (scan.matmul, scan.elementwise) == pytest.approx((2 * N, 5 * N + 1), rel=0.01)


@pytest.mark.parametrize("of, expected", [(FLOATS, 2), (WAVES, 8)])
def test_a_diagonal_recurrence_by_hand(of, expected):
    run = per_channel(diagonal, of(B, T, F), of(B, T, F), TOKENS, DiagonalState(of(B, F), NUMBERS(B)))
    assert (run.matmul, run.elementwise) == pytest.approx((0, expected), rel=0.01)


def test_a_weighted_average_by_hand():
    past = jax.eval_shape(lambda: RWKV4State.zeros(B, F, jnp.float32))
    run = per_channel(weighted_average, FLOATS(B, T, F), FLOATS(B, T, F), FLOATS(F), FLOATS(F), TOKENS, past)
    assert run.elementwise == pytest.approx(25, rel=0.01)


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_a_long_convolution_by_hand(length):
    run = count(long_convolution, FLOATS(B, length, F), FLOATS(length, F), NUMBERS(B, length)) / (B * length * F)
    assert run.matmul == pytest.approx(2 * closed_formulas.toeplitz(length), rel=0.01)
    assert run.elementwise == pytest.approx(closed_formulas.halves_by_fft(length), rel=0.01)


def test_an_unknown_layer_has_no_formula(monkeypatch):
    monkeypatch.delitem(closed_formulas.FORMULAS, "Attention")
    with pytest.raises(KeyError, match="Attention"):
        closed_formulas.model(zoo.get_config("transformer-nano"), 512)
