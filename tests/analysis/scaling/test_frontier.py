"""The compute-optimal frontier, against published tables and brute force; comparisons with known answers."""

from types import SimpleNamespace

import numpy as np
import pytest

from archlab.analysis.scaling.bootstrap import bootstrap
from archlab.analysis.scaling.fit import fit
from archlab.analysis.scaling.frontier import compute_for, exponents, gap, multiplier, optimum
from archlab.analysis.scaling.laws import DENSE, FINE_GRAINED
from archlab.analysis.scaling.points import Points

HOFFMANN = np.array([6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083])  # unrounded, of the paper's TeX source
BESIROGLU = np.array([*np.log([477.826, 2143.417, 1.81722]), 0.34731, 0.36717])


def sample(name, theta, spread=0.0, budgets=(1e18, 1e21), seed=0, draws=400):
    """Like a bootstrap's: draws about theta. Its runs' sizes lie on both sides of the best."""
    N = np.outer([0.03, 1, 30], optimum(theta, np.array(budgets))[0]).ravel()
    D = np.tile(budgets, 3) / 6 / N
    loss = DENSE.predict(theta, Points(name, N, D, np.ones(len(N))))
    thetas = theta + spread * np.random.default_rng(seed).normal(size=(draws, 5))
    return SimpleNamespace(fit=SimpleNamespace(points=Points(name, N, D, loss), law=DENSE, theta=theta), thetas=thetas)


def cheaper(theta, factor):
    """The law that needs `factor` times the compute for every loss: A and B as of sqrt(factor) times the N and D."""
    return theta + np.array([*theta[3:] * np.log(factor) / 2, 0, 0, 0])


@pytest.mark.parametrize("theta, table", [
    (HOFFMANN, [(1e19, 2.708e8, 6.154e9), (1e21, 2.217e9, 7.518e10), (5.88e23, 4.07e10, 2.405e12),
                (1e24, 5.19e10, 3.21e12)]),
    (BESIROGLU, [(1e19, 2.619e8, 6.365e9), (1e21, 2.792e9, 5.970e10), (5.88e23, 7.40e10, 1.325e12),
                 (1e24, 9.72e10, 1.715e12)])])
def test_published_allocations(theta, table):
    C, N, D = np.array(table).T
    np.testing.assert_allclose(optimum(theta, C)[0], N, rtol=2e-3)
    np.testing.assert_allclose(optimum(theta, C)[1], D, rtol=2e-3)


def test_published_exponents():
    np.testing.assert_allclose(exponents(BESIROGLU), (0.5139, 0.4861), atol=1e-4)
    np.testing.assert_allclose(exponents(HOFFMANN), (0.46, 0.54), atol=0.01)


@pytest.mark.parametrize("theta", [HOFFMANN, BESIROGLU])
def test_no_other_split_of_the_compute_is_better(theta):
    N, D, loss = optimum(theta, 1e20)
    assert 6 * N * D == pytest.approx(1e20)
    others = N * np.linspace(0.2, 5, 20001)
    tried = DENSE.predict(theta, Points("a", others, 1e20 / 6 / others, np.ones(20001)))
    assert loss == pytest.approx(DENSE.predict(theta, Points("a", [N], [D], [1]))[0], rel=1e-14)
    assert tried.min() == pytest.approx(loss, rel=1e-8) and tried.min() >= loss


def test_compute_for_a_loss_is_the_frontier_read_the_other_way():
    C = np.geomspace(1e15, 1e25, 7)
    np.testing.assert_allclose(compute_for(BESIROGLU, optimum(BESIROGLU, C)[2]), C, rtol=1e-9)
    E = np.exp(BESIROGLU[2])
    np.testing.assert_array_equal(compute_for(BESIROGLU, [E, E - 0.1, -1]), np.inf)


def test_shapes_are_those_of_theta_then_of_what_is_asked():
    thetas = np.stack([HOFFMANN, BESIROGLU])
    both = optimum(thetas, [1e18, 1e20, 1e22])[2]
    assert both.shape == (2, 3) and optimum(thetas, 1e18)[0].shape == (2,) and compute_for(HOFFMANN, 3.0).shape == ()
    np.testing.assert_array_equal(both[1], optimum(BESIROGLU, [1e18, 1e20, 1e22])[2])
    with pytest.raises(ValueError, match="theta has shape"):
        optimum(HOFFMANN[:4], 1e18)


def test_a_term_that_a_fit_found_to_be_nothing_leaves_no_nan():
    theta = HOFFMANN.copy()
    theta[0] = -np.inf  # A = 0: the smallest model will do
    assert optimum(theta, 1e20)[2] == pytest.approx(np.exp(theta[2]))
    assert compute_for(theta, 3.0) == 0


@pytest.mark.parametrize("sizes", [None, (1e7, 1e10)])
def test_a_loss_that_is_not_reached_takes_infinite_compute(sizes):
    theta = BESIROGLU + np.array([[0, 0, 0, 0, 0]] + [[0, 0, 0, 0, beta - BESIROGLU[4]] for beta in (-0.05, 0)])
    found = compute_for(theta, [3.0, np.exp(BESIROGLU[2]), 1.0], sizes)  # more tokens do not help the last two laws
    assert 0 < found[0, 0] < np.inf
    np.testing.assert_array_equal(found.ravel()[1:], np.inf)
    both = np.array([*HOFFMANN[:3], -0.3, -0.3])
    assert compute_for(both, 3.0, sizes) == np.inf


def test_a_law_that_needs_less_compute_is_told_so_at_every_loss():
    found = multiplier(sample("mamba", cheaper(BESIROGLU, 0.62), 1e-3, seed=1), sample("transformer", BESIROGLU, 1e-3))
    np.testing.assert_allclose(found.ratio, 0.62, rtol=1e-9)
    assert len(found.losses) == 5 and (np.diff(found.losses) < 0).all()
    assert (found.low < 0.62).all() and (0.62 < found.high).all() and (found.high < 1).all()
    low, high = found.low[-1], found.high[-1]
    said = f"mamba needs 0.62 x the compute of transformer ({low:.2f} to {high:.2f})"
    assert found.verdicts[-1] == said and found.verdict == f"{said} at loss {found.losses[-1]:.4g}"


def test_from_noisy_runs_to_a_multiplier():
    rng, budgets, found = np.random.default_rng(0), np.geomspace(1e18, 1e21, 4), {}
    for name, theta in {"a": cheaper(BESIROGLU, 0.8), "b": BESIROGLU}.items():
        N, C = (optimum(theta, budgets)[0] * np.geomspace(1 / 5, 5, 6)[:, None]).ravel(), np.tile(budgets, 6)
        loss = DENSE.predict(theta, Points(name, N, C / 6 / N, N)) * np.exp(0.003 * rng.normal(size=24))
        found[name] = bootstrap(fit(Points(name, N, C / 6 / N, loss), starts=10), 100)
    said = multiplier(found["a"], found["b"])
    middle = slice(1, 4)  # the ends of the range are known less well
    assert (said.low[middle] < 0.8).all() and (0.8 < said.high[middle]).all() and (said.high[middle] < 1).all()
    difference = optimum(cheaper(BESIROGLU, 0.8), 1e20)[2] - optimum(BESIROGLU, 1e20)[2]
    beside = gap(found["a"], found["b"], [1e20])
    assert beside.low[0] < difference < beside.high[0] < 0


def test_the_interval_is_that_of_independent_draws():
    """log C of each is normal, with a deviation known from the draws: that of the ratio is by Pythagoras."""
    a, b = (sample("a", BESIROGLU, 0.002, draws=4000), sample("b", BESIROGLU, 0.002, draws=4000))  # the very same draws
    found = multiplier(a, b, [2.5])
    deviation = np.log(compute_for(a.thetas, 2.5)).std() * np.sqrt(2)
    np.testing.assert_allclose(np.log([found.low[0], found.high[0]]), [-1.96 * deviation, 1.96 * deviation], rtol=0.08)


def test_what_the_noise_hides_is_not_distinguishable():
    found = multiplier(sample("a", cheaper(BESIROGLU, 0.97), 0.02, seed=1), sample("b", BESIROGLU, 0.02))
    assert all(said.startswith("not distinguishable (") for said in found.verdicts)
    assert found.verdict.startswith("not distinguishable (0.")
    found = gap(sample("a", cheaper(BESIROGLU, 0.97), 0.02, seed=1), sample("b", BESIROGLU, 0.02))
    assert found.verdict.startswith("not distinguishable (-0.")


def test_laws_that_cross_are_told_at_both_ends():
    steep = BESIROGLU + np.array([0, 0, 0, 0.05, 0.05])
    steep[:2] += 0.05 * np.log(optimum(BESIROGLU, 3e19)[:2])
    found = multiplier(sample("a", steep, 1e-5, seed=1), sample("b", BESIROGLU, 1e-5))
    first, last = found.verdict.split("; ")[::-1]
    assert found.ratio[0] > 1 > found.ratio[-1] and first.startswith("a needs 1.") and last.startswith("a needs 0.")


def test_draws_that_never_reach_the_loss_are_infinite_and_not_dropped():
    a, b = sample("a", BESIROGLU, 1e-3, seed=1), sample("b", BESIROGLU, 1e-3)
    loss = [optimum(BESIROGLU, 1e21)[2]]
    floor = a.thetas.copy()
    a.thetas[::20, 2] = np.log(loss[0] + 0.1)  # one in twenty: more than the upper tail
    found = multiplier(a, b, loss)
    assert found.high[0] == np.inf and np.isfinite(found.low[0])
    assert found.verdict.startswith(f"undetermined, too few or too noisy runs (at least {found.low[0]:.2f})")
    found = multiplier(b, a, loss)
    assert found.low[0] == 0 and "at most" in found.verdict
    a.thetas = floor
    a.thetas[::100, 2] = np.log(loss[0] + 0.1)  # one in a hundred: within the tail
    assert np.isfinite(multiplier(a, b, loss).high[0])
    a.thetas[:, 2] = b.thetas[:, 2] = np.log(loss[0] + 0.1)
    found = multiplier(a, b, loss)
    assert (found.low[0], found.high[0]) == (0, np.inf) and "undetermined" in found.verdict


def test_what_not_both_reached_is_not_compared():
    a, b = sample("a", BESIROGLU, budgets=(1e15, 1e16)), sample("b", BESIROGLU, budgets=(1e20, 1e21))
    found = multiplier(a, b)
    assert len(found.ratio) == 0 and found.verdicts == ()
    assert "reached no loss in common (a from 7.55" in found.verdict
    assert "no range of compute in common (a from 1e+15 to 1e+16" in gap(a, b).verdict
    with pytest.raises(ValueError, match="losses = .4..: not reached by both"):
        multiplier(a, b, 4)  # between what one reached and what the other did
    b = sample("b", BESIROGLU)
    with pytest.raises(ValueError, match=r"losses = \[1.9\]: not reached by both"):
        multiplier(b, b, [2.5, 1.9])
    with pytest.raises(ValueError, match="budgets = .*: not reached by both"):
        gap(b, b, [1e22])
    b.fit.law = FINE_GRAINED
    with pytest.raises(ValueError, match="fine-grained experts"):
        multiplier(b, b)


def test_the_gap_at_equal_compute():
    a, b = sample("a", BESIROGLU - [0, 0, 0.02, 0, 0], 2e-4, seed=1), sample("b", BESIROGLU, 2e-4)
    found = gap(a, b)
    np.testing.assert_allclose(found.budgets, np.geomspace(1e18, 1e21, 5))
    np.testing.assert_allclose(found.difference, 1.81722 * np.expm1(-0.02), rtol=1e-9)
    assert (found.low < found.difference).all() and (found.difference < found.high).all() and (found.high < 0).all()
    assert found.verdict.startswith("the loss of a is 0.036 below that of b (-0.0")


@pytest.mark.parametrize("sizes", [(1e6, 1e12), (1e6, 3e8), (2e10, 1e12), (5e8, 5e8)])
def test_the_best_of_some_sizes(sizes):
    """Against all sizes in a row: the best of them, its loss, and the compute that a loss takes."""
    N = np.geomspace(*sizes, 20_001)
    E, A, alpha, B, beta = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
    theta = np.array([np.log(A), np.log(B), np.log(E), alpha, beta])
    for C in (1e19, 1e21, 1e23):
        losses = E + A / N**alpha + B / (C / 6 / N) ** beta
        best, D, loss = optimum(theta, np.array(C), sizes)
        assert loss == pytest.approx(losses.min(), rel=1e-8) and D == pytest.approx(C / 6 / best)
        assert compute_for(theta, np.array(loss), sizes) == pytest.approx(C, rel=1e-3)
    floor = E + A / sizes[1] ** alpha  # of the largest, however long it is trained
    assert compute_for(theta, 0.9999 * floor, sizes) == np.inf
    chosen = compute_for(np.stack([theta, theta]), np.array([2.5, 3.0, 4.0]), sizes)
    assert chosen.shape == (2, 3)


def test_laws_without_an_optimum_have_one_among_sizes():
    """More parameters only harm, or only help: the smallest, or the largest, is best."""
    harm = np.array([0.0, np.log(400.0), 0.0, -0.05, 0.3])
    assert optimum(harm, 1e18, (1e6, 1e9))[0] == 1e6
    help_ = np.array([np.log(400.0), -np.inf, 0.0, 0.3, 0.3])
    assert optimum(help_, 1e18, (1e6, 1e9))[0] == 1e9
