"""The largest budget foretold from the others."""

import numpy as np
import pytest

from archlab.analysis.scaling.holdout import holdout
from archlab.analysis.scaling.laws import DENSE
from archlab.analysis.scaling.points import Points

LAW = np.array([*np.log([477.826, 2143.417, 1.81722]), 0.34731, 0.36717])


def grid(budgets=(1e18, 1e19, 1e20), grouped=True):
    N, C = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 5), budgets))
    points = Points("mamba", N, C / 6 / N, DENSE.predict(LAW, Points("a", N, C / 6 / N, N)))
    return Points("mamba", points.N, points.D, points.loss, budget=C if grouped else None)


@pytest.mark.parametrize("grouped", [True, False])
def test_a_law_without_noise_is_foretold(grouped):
    found = holdout(grid(grouped=grouped))
    assert len(found.left_out) == 5 and len(found.fit.points) == 10 and found.left_out.C.min() > 9e19
    np.testing.assert_allclose(found.predicted, found.observed, rtol=1e-6)
    assert found.mean_error < 1e-6


def test_without_budgets_a_tenth_of_the_runs_is_left_out():
    rng = np.random.default_rng(0)
    N, D = np.exp(rng.uniform(np.log(1e7), np.log(1e9), 60)), np.exp(rng.uniform(np.log(1e8), np.log(1e11), 60))
    points = Points("a", N, D, DENSE.predict(LAW, Points("a", N, D, N)))
    found = holdout(points)
    assert len(found.left_out) == 6 and found.left_out.C.min() > found.fit.points.C.max()


def test_errors_have_the_sign_of_what_was_predicted_too_high():
    points = grid()
    points.loss[-5:] *= [0.9, 0.9, 0.9, 0.9, 1.2]
    found = holdout(points)
    np.testing.assert_allclose(found.error, [1 / 0.9 - 1] * 4 + [1 / 1.2 - 1], rtol=1e-4)
    assert found.bias == pytest.approx((4 / 9 - 1 / 6) / 5, rel=1e-4)
    assert found.mean_error == pytest.approx((4 / 9 + 1 / 6) / 5, rel=1e-4)


def test_too_little_to_fit_is_refused():
    with pytest.raises(ValueError, match="mamba: without the 5 runs of the most compute .1e.19 FLOPs. 0 remain"):
        holdout(grid([1e19]))
    with pytest.raises(ValueError, match="without the 5 runs .* 3 remain, too little for a law"):
        holdout(grid().take([0, 1, 2, 10, 11, 12, 13, 14]))
    with pytest.raises(ValueError, match="mamba: no runs"):
        holdout(grid().take([]))
