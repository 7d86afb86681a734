"""Intervals of coefficients: they hold the truth about as often as they say."""

import chex
import numpy as np
import pytest

from archlab.analysis.scaling.bootstrap import bootstrap
from archlab.analysis.scaling.fit import fit
from archlab.analysis.scaling.laws import DENSE, RECURSIVE
from archlab.analysis.scaling.newton import objective
from archlab.analysis.scaling.points import Points

GRID = np.array([4.1, 6.0, 0.18, 0.34, 0.37]), 0.005  # a ladder of small models: theta, noise
SWEEP = np.array([6.18, 7.64, 0.597, 0.348, 0.366]), 0.005


def grid(seed):
    """A designed grid: four sizes at each of three budgets."""
    theta, noise = GRID
    budget = np.repeat([1e13, 3e13, 1e14], 4)
    N = np.tile(np.geomspace(1.2e5, 2e6, 4), 3) * np.repeat([0.7, 1, 1.5], 4)
    return with_noise(theta, noise, N, budget / 6 / N, seed)


def sweep(seed, n=48):
    """Many runs, from 1/8 to 8 times the parameters that 20 tokens each would allow."""
    theta, noise = SWEEP
    budget = np.repeat(np.geomspace(6e18, 3e21, n // 8), 8)
    N = np.sqrt(budget / 120) * np.tile(np.geomspace(1 / 8, 8, 8), n // 8)
    return with_noise(theta, noise, N, budget / 6 / N, seed)


def with_noise(theta, noise, N, D, seed):
    loss = DENSE.predict(theta, Points("", N, D, np.ones(len(N))))
    return Points("made", N, D, loss * np.exp(noise * np.random.default_rng(seed).normal(size=len(N))))


def share_held(points, theta, by, repetitions, refits, level=0.95):
    """How often the interval of each coefficient holds the truth, in percent, [P]."""
    truth, held = list(DENSE.natural(theta).values()), np.zeros(len(theta))
    for seed in range(repetitions):
        sample = bootstrap(fit(points(seed), starts=5), refits, by, seed)
        low, high = np.array([sample.interval(name, level) for name in DENSE.names]).T
        held += (low <= truth) & (truth <= high)
    return 100 * held / repetitions


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = share_held(grid, GRID[0], "residuals", repetitions=200, refits=80)
    assert (held >= 90).all() and (held <= 99).all(), held


@pytest.mark.parametrize("by", ["runs", "residuals"])
def test_intervals_of_a_sweep_hold_the_truth(by):
    """Fewer repetitions, to be quick, and so a wider bound."""
    held = share_held(sweep, SWEEP[0], by, repetitions=30, refits=80)
    assert (held >= 85).all(), held


def test_narrower_intervals_hold_it_less_often():
    held = share_held(grid, GRID[0], "residuals", repetitions=40, refits=40, level=0.5)
    assert (held >= 25).all() and (held <= 75).all(), held


def test_a_refit_is_a_minimum_for_what_was_drawn():
    """By runs: the same as a fit of the drawn runs, each as often as it was drawn."""
    points = sweep(0)
    sample = bootstrap(fit(points), 3, "runs", seed=5)
    drawn = np.random.default_rng(5).multinomial(len(points), np.full(len(points), 1 / len(points)), 3)
    for theta, times in zip(sample.thetas, drawn):
        again = fit(points.take(np.repeat(np.arange(len(points)), times)))
        chex.assert_trees_all_close(theta, again.theta, rtol=1e-5)
        assert objective(theta, DENSE, again.points)[0] == pytest.approx(again.objective, rel=1e-9)


def test_what_a_sample_tells():
    found = fit(sweep(0))
    sample = bootstrap(found, 50, seed=1)
    drawn = np.exp(sample.thetas[:, 2])
    assert sample.thetas.shape == (50, 5) and sample.fit is found
    chex.assert_trees_all_close(sample.interval("E", 0.8), tuple(np.sort(drawn)[[4, 45]]), rtol=1e-12)
    few = lambda thetas: np.exp(thetas[:, :3])
    chex.assert_trees_all_close(sample.standard_error_of(few)[2], drawn.std(ddof=1), rtol=1e-12)
    low, high = sample.interval_of(few)
    assert low.shape == high.shape == (3,) and low[2] == pytest.approx(sample.interval("E")[0])
    chex.assert_trees_all_equal(bootstrap(found, 50, seed=1).thetas, sample.thetas)
    assert np.abs(bootstrap(found, 50, seed=2).thetas - sample.thetas).max() > 0


def test_runs_without_noise_leave_nothing_open():
    points = with_noise(SWEEP[0], 0.0, grid(0).N, grid(0).D, 0)
    for by in ("runs", "residuals"):
        thetas = bootstrap(fit(points), 50, by).thetas
        assert np.median(np.abs(thetas - SWEEP[0])[:, 3:]) < 1e-6


def test_every_law_has_intervals():
    rng = np.random.default_rng(0)
    N, D, r = 10 ** rng.uniform(7, 10, 40), 10 ** rng.uniform(9, 11, 40), rng.choice([1, 2, 4], 40)
    more = {"N_once": 0.3 * N, "N_recurring": 0.7 * N, "recursions": r}
    theta = np.append(SWEEP[0], 0.46)
    bare = Points("", N, D, np.ones(40), more=more)
    points = Points("made", N, D, RECURSIVE.predict(theta, bare) * np.exp(0.003 * rng.normal(size=40)), more=more)
    low, high = bootstrap(fit(points, RECURSIVE), 100, "residuals").interval("phi", 0.99)
    assert low < 0.46 < high < low + 1


@pytest.mark.parametrize("wrong, told", [({"repetitions": 1}, "repetitions = 1"),
                                         ({"by": "points"}, "runs, residuals")])
def test_settings_of_a_bootstrap_that_make_no_sense(wrong, told):
    with pytest.raises(ValueError, match=told):
        bootstrap(fit(grid(0), starts=5), **wrong)


def test_questions_that_a_sample_cannot_answer():
    sample = bootstrap(fit(grid(0), starts=5), 2)
    with pytest.raises(ValueError, match="'gamma': must be one of A, B, E, alpha, beta"):
        sample.interval("gamma")
    with pytest.raises(ValueError, match="level = 95"):
        sample.interval("E", level=95)
    with pytest.raises(ValueError, match="5 runs for 5 coefficients"):
        bootstrap(fit(grid(0).take([0, 3, 5, 8, 10]), starts=5), by="residuals")
