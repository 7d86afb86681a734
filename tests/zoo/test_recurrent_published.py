"""Published sizes of recurrent families: the totals of parameters, counted without making any."""

import pytest

import archlab
from archlab.analysis.accounts import count_parameters

TOTALS = {
    # exact: the sizes of the published checkpoints' tensors
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-780m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "falcon-mamba-7b": 7_272_665_088,
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.4b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
    "recurrentgemma-2b": 2_682_862_080,
    "recurrentgemma-9b": 8_579_977_216,
    "xlstm-7b": 6_865_424_896,
    # derived from the authors' configs; the names count one of the two tables at most
    "hawk-7b": 8_161_562_624,
    "griffin-7b": 7_795_144_704,
    "gla-340m": 374_475_776,
    "gla-1.3b": 1_365_514_240,
    "delta-net-340m": 374_362_112,
    "delta-net-1.3b": 1_365_677_056,
    "gated-delta-net-340m": 379_888_124,
    "gated-delta-net-1.3b": 1_387_348_732,
}


@pytest.mark.parametrize("name", TOTALS)
def test_totals(name):
    assert count_parameters(archlab.get_config(name)).total == TOTALS[name]


# published as rounded, in billions
ROUNDED = {
    "xlstm-1-0-350m": 0.409,
    "xlstm-7-1-350m": 0.408,
    "retnet-1.3b": 1.3,
    "retnet-2.7b": 2.7,
    "retnet-6.7b": 6.7,
    "minimax-01-456b": 456,
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded(name):
    assert count_parameters(archlab.get_config(name)).total / 1e9 == pytest.approx(ROUNDED[name], rel=0.03)
