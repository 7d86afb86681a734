"""Fits on runs whose law is known: exact without noise, one optimum with it, refusals where nothing can be told."""

import chex
import numpy as np
import pytest
from scipy.optimize import minimize

from archlab.analysis.scaling.fit import check, fit, starting_points, variable_projection
from archlab.analysis.scaling.laws import DENSE, FINE_GRAINED, JOINT_EXPERTS, LAWS, RECURSIVE
from archlab.analysis.scaling.newton import objective
from archlab.analysis.scaling.points import Points

TRUTHS = {DENSE: [6.18, 7.64, 0.597, 0.348, 0.366],  # near what published data give
          JOINT_EXPERTS: [3.58, 3.58, 0.31, -0.189, -0.0098, 0.2285, -0.1775, 0.0259, -0.5529],
          FINE_GRAINED: [0.74, 2.9, 3.43, -0.76, 0.58, 0.115, 0.147],
          RECURSIVE: [6.18, 7.64, 0.597, 0.348, 0.366, 0.46]}


def made(law=DENSE, n=48, noise=0.0, seed=0, theta=None):
    """Runs of a law: sizes and tokens scattered over two and a half decades, and every further column varied."""
    rng = np.random.default_rng(seed)
    N, D = 10 ** rng.uniform(7.5, 10, n), 10 ** rng.uniform(9, 11.5, n)
    more = {"experts": rng.choice([1, 4, 16, 64], n), "granularity": rng.choice([1, 2, 4, 8], n),
            "recursions": rng.choice([1, 2, 4, 8], n), "N_once": N * rng.uniform(0.1, 0.5, n), "N_recurring": N}
    bare = Points("made", N, D, np.ones(n), more=more)
    loss = law.predict(np.array(TRUTHS[law] if theta is None else theta), bare) * np.exp(noise * rng.normal(size=n))
    return Points("made", N, D, loss, more=more)


def but(points, **columns):
    """The same runs with some columns changed, or taken out (None)."""
    own = {key: columns.pop(key, getattr(points, key)) for key in ("N", "D", "loss")}
    more = {key: value for key, value in {**points.more, **columns}.items() if value is not None}
    return Points(points.name, **own, more=more)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_a_law_without_noise_is_found_again(law):
    found = fit(made(law), law)
    chex.assert_trees_all_close(found.theta[law.terms:], np.array(TRUTHS[law][law.terms:]), atol=1e-6)
    chex.assert_trees_all_close(found.theta, np.array(TRUTHS[law]), atol=1e-5)
    assert found.objective < 1e-20 and found.arrived > 0.8 and found.absent == ()
    assert np.abs(found.residuals).max() < 1e-9


def test_all_published_starts_end_at_one_optimum():
    points = made(n=20, noise=0.005)
    found, screened = fit(points, starts=None), fit(points)
    assert found.arrived == 1 and screened.arrived == 1
    chex.assert_trees_all_close(found.theta, screened.theta, rtol=1e-6)
    assert found.objective == pytest.approx(screened.objective, rel=1e-12)


def test_a_fit_is_a_minimum():
    points = made(noise=0.005)
    found = fit(points)
    assert found.objective == pytest.approx(objective(found.theta, DENSE, points)[0], rel=1e-12)
    for direction in np.random.default_rng(0).normal(size=(200, 5)):
        assert objective(found.theta + 1e-4 * direction, DENSE, points)[0] > found.objective


def test_newton_and_the_published_method_agree():
    points = made(noise=0.005)
    newton, lbfgs = fit(points), fit(points, starts=2, method="l-bfgs")
    chex.assert_trees_all_close(newton.theta, lbfgs.theta, rtol=1e-6)
    assert newton.objective == pytest.approx(lbfgs.objective, rel=1e-9)


def test_variable_projection_agrees_without_noise():
    points = made()
    projected = variable_projection(points)
    chex.assert_trees_all_close(projected.theta[3:], fit(points).theta[3:], atol=1e-6)
    chex.assert_trees_all_close(projected.theta, np.array(TRUTHS[DENSE]), atol=1e-5)
    assert projected.arrived == 1 and projected.objective < 1e-12


def test_variable_projection_is_least_squares_with_noise():
    """No worse in squares of relative errors than the Huber fit, and no better in Huber's loss."""
    points = made(noise=0.01)
    projected, found = variable_projection(points), fit(points)
    squares = lambda one: np.square(one.predict(points) / points.loss - 1).sum()
    assert squares(projected) < squares(found) and projected.objective > found.objective
    assert abs(projected.theta[3] - found.theta[3]) < 0.1


def test_averaging_the_loss_stops_early_at_a_wrong_fit():
    """The mean of Huber's loss is so flat that scipy's default tolerances end every search before it arrives, and the
    best of them is a wrong law. The sum goes on from there to the right one."""
    points = made(n=240, noise=0.005)
    found = fit(points)
    mean = lambda theta: tuple(part / len(points) for part in objective(theta, DENSE, points))
    ends = [minimize(mean, start, jac=True, method="L-BFGS-B").x for start in DENSE.starts()[::450]]
    averaged = min(ends, key=lambda theta: objective(theta, DENSE, points)[0])
    assert objective(averaged, DENSE, points)[0] > 1.1 * found.objective
    assert np.abs(averaged - found.theta)[3:].max() > 0.02
    tight = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000, "maxfun": 20000}
    summed = minimize(lambda theta: objective(theta, DENSE, points), averaged, jac=True, method="L-BFGS-B",
                      options=tight).x
    chex.assert_trees_all_close(summed[3:], found.theta[3:], atol=1e-4)


@pytest.mark.parametrize("gone", ["A", "B", "E"])
def test_a_term_that_is_not_there_is_said_to_be_absent(gone):
    theta = np.array(TRUTHS[DENSE])
    theta[DENSE.names.index(gone)] = -50
    points = made(theta=theta)
    for found in (fit(points, starts=20), variable_projection(points)):
        chex.assert_trees_all_close(found.predict(points), points.loss, rtol=1e-5)
        assert found.absent == (gone,)
    assert np.isfinite(fit(made(theta=theta, noise=0.01), starts=20).objective)


def test_what_a_fit_tells():
    points = made(noise=0.01)
    found = fit(points)
    assert tuple(found.coefficients) == DENSE.names
    c = found.coefficients
    expected = c["E"] + c["A"] / points.N ** c["alpha"] + c["B"] / points.D ** c["beta"]
    chex.assert_trees_all_close(found.predict(points), expected, rtol=1e-12)
    chex.assert_trees_all_close(found.residuals, np.log(points.loss / expected), atol=1e-12)


def test_starts_are_within_reach_and_in_order():
    points = made(noise=0.01)
    starts = starting_points(points, DENSE)
    sizes = DENSE.log_terms(starts, points)[0].mean(-1) - np.log(points.loss).mean()
    assert starts.shape == (4500, 5) and sizes.min() > -3.001 and sizes.max() < 0.001
    assert (np.diff(objective(starts, DENSE, points)[0]) >= 0).all()


GOOD = made(n=24)
BROKEN = {"nan": np.where(np.arange(24) == 3, np.nan, GOOD.loss), "negative": np.where(np.arange(24) == 3, -1, GOOD.N)}


@pytest.mark.parametrize("points, law, told", [
    (GOOD.take(range(4)), DENSE, "5 coefficients and there are 4 runs: must be at least 5"),
    (but(GOOD, N=np.full(24, 1e8)), DENSE, "on 1 sizes: must be at least 3"),
    (but(GOOD, N=np.tile([1e8, 2e8], 12)), DENSE, "on 2 sizes.*N's exponent"),
    (but(GOOD, D=np.tile([1e9, 1.001e9, 2e9], 8)), DENSE, "on 2 numbers of tokens.*D's exponent"),
    (but(GOOD, D=20 * GOOD.N), DENSE, "tokens that follow from the size.*must vary on their own"),
    (but(GOOD, loss=BROKEN["nan"]), DENSE, "loss = nan in run 4: must be finite and above 0"),
    (but(GOOD, N=BROKEN["negative"]), DENSE, "N = -1.0 in run 4"),
    (but(GOOD, D=np.where(np.arange(24) == 3, np.inf, GOOD.D)), DENSE, "D = inf"),
    (but(GOOD, experts=None), JOINT_EXPERTS, "needs the column experts; the points have N, D, loss, granularity"),
    (but(GOOD, N_once=None, recursions=None), RECURSIVE, "needs the columns recursions, N_once"),
    (but(GOOD, experts=np.full(24, 8)), JOINT_EXPERTS, "on experts = 8 alone: must vary"),
    (but(GOOD, granularity=np.zeros(24)), FINE_GRAINED, "granularity = 0.0 in run 1"),
    (but(GOOD, N_once=np.full(24, 1e7), N_recurring=np.full(24, 1e8)), RECURSIVE, "on 1 sizes")])
def test_runs_that_determine_no_law_are_refused(points, law, told):
    with pytest.raises(ValueError, match=told):
        fit(points, law)
    with pytest.raises(ValueError):
        check(points, law)
    if law is DENSE:
        with pytest.raises(ValueError, match=told):
            variable_projection(points)


@pytest.mark.parametrize("wrong, told", [({"starts": 0}, "starts = 0"), ({"method": "bfgs"}, "newton, l-bfgs")])
def test_settings_of_a_fit_that_make_no_sense(wrong, told):
    with pytest.raises(ValueError, match=told):
        fit(GOOD, **wrong)
