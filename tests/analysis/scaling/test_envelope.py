"""The lower envelope, against all pairs of points, and its exponents, against the law's own."""

import numpy as np
import pytest

from archlab.analysis.scaling.envelope import envelope
from archlab.analysis.scaling.frontier import exponents, optimum
from archlab.analysis.scaling.laws import DENSE
from archlab.analysis.scaling.points import Points

LAW = np.array([*np.log([477.826, 2143.417, 1.81722]), 0.34731, 0.36717])


def runs(sizes, stops):
    """Each size is trained once; the loss is read at every stop, in FLOPs."""
    N, C = (x.ravel() for x in np.meshgrid(sizes, stops))
    return Points("a", N, C / 6 / N, DENSE.predict(LAW, Points("a", N, C / 6 / N, N)))


def test_no_run_and_no_mixture_of_two_lies_below():
    rng = np.random.default_rng(0)
    points = Points("a", rng.uniform(1, 9, 60), rng.uniform(1, 9, 60), rng.uniform(2, 3, 60))
    found = envelope(points).points
    reach = points.C <= found.C[-1]
    below = np.interp(np.log(points.C), np.log(found.C), np.log(found.loss))
    assert (np.log(points.loss) >= below - 1e-12)[reach].all() and found.loss[-1] == points.loss.min()
    slopes = np.diff(np.log(found.loss)) / np.diff(np.log(found.C))
    assert (slopes < 0).all() and (np.diff(slopes) > 0).all()
    assert set(found.C) <= set(points.C) and len(found) >= 3


def test_exponents_near_the_law_where_sizes_are_many():
    best = optimum(LAW, np.array([1e18, 1e20]))[0]
    found = envelope(runs(np.geomspace(best[0] / 4, best[1] * 4, 33), np.geomspace(1e18, 1e20, 60)))
    a = exponents(LAW)[0]
    assert found.N_law.exponent == pytest.approx(a, abs=0.01) and found.N_law.low < a < found.N_law.high
    np.testing.assert_allclose(found.points.loss, optimum(LAW, found.points.C)[2], rtol=1e-3)


def test_equal_compute_counts_once_and_losses_that_do_not_fall_are_refused():
    found = envelope(Points("a", [1, 2, 4, 4], [8, 4, 2, 8], [3, 2.5, 2.7, 2]))
    np.testing.assert_array_equal(found.points.N, [2, 4])
    with pytest.raises(ValueError, match="a: 1 of 2 runs on the envelope"):
        envelope(Points("a", [1, 2], [1, 1], [2, 3]))
