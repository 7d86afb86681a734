"""Published sizes of the recurrent families: the totals of parameters, counted without making any."""

import pytest

import archlab
from archlab.analysis.accounts import count_parameters

# Exact: what the published checkpoints or configs hold.
TOTALS = {
}

# Published as rounded, in billions.
ROUNDED = {
    "retnet-1.3b": 1.3,
    "retnet-2.7b": 2.7,
    "retnet-6.7b": 6.7,
}


@pytest.mark.parametrize("name", TOTALS)
def test_total(name):
    assert count_parameters(archlab.get_config(name)).total == TOTALS[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded(name):
    assert count_parameters(archlab.get_config(name)).total / 1e9 == pytest.approx(ROUNDED[name], rel=0.03)
