"""IsoFLOP parabolas: known ones recovered, and their bias on a law without noise, which the fit does not have."""

import numpy as np
import pytest

from archlab.analysis.scaling.fit import fit
from archlab.analysis.scaling.frontier import exponents, optimum
from archlab.analysis.scaling.isoflop import parabolas, power_laws
from archlab.analysis.scaling.laws import DENSE
from archlab.analysis.scaling.points import Points

LAW = np.array([*np.log([477.826, 2143.417, 1.81722]), 0.34731, 0.36717])
BUDGETS = np.geomspace(1e18, 1e20, 5)


def grid(sizes):
    """The law without noise at every budget; sizes [budgets, n]."""
    N, C = sizes.ravel(), np.repeat(BUDGETS, sizes.shape[1])
    return Points("a", N, C / 6 / N, DENSE.predict(LAW, Points("a", N, C / 6 / N, N)), budget=C)


def bowls(opens=0.05):
    """True parabolas, their minima at N = 2 C^0.45."""
    C, way = np.repeat(BUDGETS, 4), np.tile([-1.5, -0.3, 0.4, 2], 5)
    N = 2 * C**0.45 * np.exp(way)
    return Points("a", N, C / 6 / N, 3 + opens * way**2, budget=C)


def test_true_parabolas_are_recovered():
    found = parabolas(bowls())
    assert [p.C for p in found] == [p.budget for p in found] == list(BUDGETS) and all(p.inside for p in found)
    np.testing.assert_allclose([p.N_opt for p in found], 2 * BUDGETS**0.45, rtol=1e-8)
    np.testing.assert_allclose([p.loss_opt for p in found], 3, rtol=1e-12)
    np.testing.assert_allclose(found[0].loss_at(found[0].N_opt * np.exp([0, 1])), [3, 3.05], rtol=1e-9)
    tokens, sizes = power_laws(found)[::-1]
    assert (sizes.exponent, tokens.exponent) == pytest.approx((0.45, 0.55), abs=1e-9)
    assert sizes.factor == pytest.approx(2, rel=1e-6) and tokens.factor == pytest.approx(1 / 12, rel=1e-6)
    assert sizes(1e19) == pytest.approx(2 * 1e19**0.45)


def test_compute_that_differs_within_a_budget_is_that_of_the_minimum():
    """N counted otherwise than budgets are: 6 N D = budget (N / 1e6)^0.1, and so D is what it was."""
    points = bowls()
    points.D[:] *= (points.N / 1e6) ** 0.1
    found = parabolas(points)
    sizes = 2 * BUDGETS**0.45
    C = BUDGETS * (sizes / 1e6) ** 0.1
    np.testing.assert_allclose([p.C for p in found], C, rtol=1e-8)
    np.testing.assert_allclose([p.D_opt for p in found], C / 6 / sizes, rtol=1e-8)
    law, tokens = power_laws(found)
    assert (law.exponent, tokens.exponent) == pytest.approx((0.45 / 1.045, 0.595 / 1.045), abs=1e-9)
    points.D[:] = points.budget / 6 / points.N * np.tile([0.99, 1.04, 0.97, 1.02], 5)  # whole steps, no convention
    assert [p.C for p in parabolas(points)] == list(BUDGETS)
    points.loss[-4:] = 3 - np.array([0.1, 0, 0, 0.1])  # no minimum, yet there is a compute to show
    points.D[-4:] *= 2
    assert np.isnan(parabolas(points)[-1].N_opt) and 1.9 < parabolas(points)[-1].C / BUDGETS[-1] < 2.1


def test_a_minimum_outside_of_the_sizes_is_said_and_not_used():
    points = bowls()
    way = np.log(points.N / (2 * points.budget**0.45))
    beside = points.take((points.budget < BUDGETS[-1]) | (way > -1))  # of the largest budget, three sizes
    beside.loss[-3:] = 3 + (way[-3:] + 0.5) ** 2  # ... and a minimum to the left of them
    found = parabolas(beside)
    assert [p.inside for p in found] == [True] * 4 + [False]
    assert found[-1].N_opt == pytest.approx(2 * BUDGETS[-1] ** 0.45 * np.exp(-0.5))
    assert power_laws(found) == power_laws(found[:-1])
    with pytest.raises(ValueError, match="1 of 2 isoFLOP parabolas"):
        power_laws(found[-2:])


def test_what_opens_downwards_has_no_minimum():
    found = parabolas(bowls(opens=-0.05))
    assert not any(p.inside for p in found) and np.isnan([(p.N_opt, p.loss_opt) for p in found]).all()


def test_fewer_than_three_sizes_or_no_budgets_give_no_parabola():
    points = bowls()
    assert parabolas(points.take([0, 1, 1, 1, 4, 5, 6]))[0].budget == BUDGETS[1]
    assert parabolas(Points("a", points.N, points.D, points.loss)) == []


def test_parabolas_are_biased_without_noise_where_the_fit_is_exact():
    """The same sizes at every budget: the smallest optimum lies at the left of them, the largest in the middle."""
    best = optimum(LAW, BUDGETS)[0]
    points = grid(np.tile(np.geomspace(best[0] / 2, best[-1] * 8, 9), (5, 1)))
    found = parabolas(points)
    assert all(p.inside for p in found)
    assert abs(power_laws(found)[0].exponent - exponents(LAW)[0]) > 0.03
    assert exponents(fit(points).theta)[0] == pytest.approx(exponents(LAW)[0], abs=1e-6)


@pytest.mark.parametrize("low, high, off", [(1 / 30, 30, -0.029), (1 / 2, 16, 0.033)])
def test_sizes_wide_or_to_one_side_shift_minima(low, high, off):
    """... by the same share at every budget, where the sizes move with the optimum: then the exponents are right."""
    best = optimum(LAW, BUDGETS)[0]
    found = parabolas(grid(best[:, None] * np.geomspace(low, high, 7)))
    np.testing.assert_allclose([p.N_opt / N - 1 for p, N in zip(found, best)], off, atol=1e-3)
    assert power_laws(found)[0].exponent == pytest.approx(exponents(LAW)[0], abs=1e-9)
