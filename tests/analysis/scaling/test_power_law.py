"""A power law through points, with the interval of its exponent."""

import numpy as np
import pytest

from archlab.analysis.scaling.power_law import power_law


def test_an_exact_one_is_recovered():
    found = power_law([1e18, 1e19, 1e21], 3 * np.array([1e18, 1e19, 1e21]) ** 0.5)
    assert found.exponent == pytest.approx(0.5) and found.factor == pytest.approx(3)
    assert found(4e18) == pytest.approx(6e9)
    np.testing.assert_allclose([found.low, found.high], 0.5, atol=1e-6)


def test_two_points_have_no_interval():
    found = power_law([1, 2], [1, 4])
    assert found.exponent == pytest.approx(2) and np.isnan([found.low, found.high]).all()


def test_the_interval_covers_the_truth_in_95_of_100():
    rng, x = np.random.default_rng(0), np.geomspace(1, 100, 5)
    drawn = [power_law(x, x**0.7 * np.exp(0.1 * rng.normal(size=5))) for _ in range(1000)]
    assert np.mean([one.low < 0.7 < one.high for one in drawn]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("x, y", [([1, 1], [1, 2]), ([1], [1]), ([1, 2], [0, 1]), ([1, np.nan], [1, 1])])
def test_refusals(x, y):
    with pytest.raises(ValueError, match="a power law needs"):
        power_law(x, y)
