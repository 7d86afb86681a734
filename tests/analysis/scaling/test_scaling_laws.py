"""The laws against slow loops written from the papers' formulas, and their gradients against differences."""

import chex
import numpy as np
import pytest

from archlab.analysis.scaling.laws import DENSE, FINE_GRAINED, JOINT_EXPERTS, LAWS, RECURSIVE, JointExperts
from archlab.analysis.scaling.newton import DELTA, objective
from archlab.analysis.scaling.points import Points

THETAS = {DENSE: [6.0, 7.5, 0.6, 0.34, 0.37],
          JOINT_EXPERTS: [3.6, 3.6, 0.3, -0.19, -0.01, 0.23, -0.18, 0.03, -0.55],
          FINE_GRAINED: [0.7, 2.9, 3.4, -0.7, 0.58, 0.12, 0.15],
          RECURSIVE: [6.0, 7.5, 0.6, 0.34, 0.37, 0.46]}


def some_points(n=14, seed=0):
    rng = np.random.default_rng(seed)
    N, D = 10 ** rng.uniform(5, 8, n), 10 ** rng.uniform(6, 9, n)
    more = {"experts": rng.choice([1, 4, 16], n), "granularity": rng.choice([1, 2, 8], n),
            "recursions": rng.choice([1, 2, 4], n), "N_once": 0.3 * N, "N_recurring": 0.7 * N ** 0.99}
    return Points("some", N, D, rng.uniform(2, 4, n), more=more)


def dense(theta, N, D, run):
    A, B, E, alpha, beta = np.exp(theta[0]), np.exp(theta[1]), np.exp(theta[2]), theta[3], theta[4]
    return E + A / N ** alpha + B / D ** beta


def joint(theta, N, D, run, start=1.0, limit=np.inf):
    a, b, c = np.exp(theta[:3])
    alpha, gamma, delta, beta, zeta, omega = theta[3:]
    E = 1 / (1 / (run["experts"] - 1 + 1 / (1 / start - 1 / limit)) + 1 / limit)
    return a * E ** delta * N ** (alpha + gamma * np.log(E)) + b * E ** omega * D ** (beta + zeta * np.log(E)) + c


def fine_grained(theta, N, D, run):
    g, a, b, c = np.exp(theta[:4])
    gamma, alpha, beta = theta[4:]
    return c + (g / run["granularity"] ** gamma + a) / N ** alpha + b / D ** beta


def recursive(theta, N, D, run):
    A, B, E = np.exp(theta[:3])
    alpha, beta, phi = theta[3:]
    return E + A * (run["N_once"] + run["recursions"] ** phi * run["N_recurring"]) ** -alpha + B * D ** -beta


FORMULAS = {DENSE: dense, JOINT_EXPERTS: joint, FINE_GRAINED: fine_grained, RECURSIVE: recursive}
each_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)


def by_loop(formula, theta, points, **settings):
    runs = [{name: column[i] for name, column in points.more.items()} for i in range(len(points))]
    return np.array([formula(np.array(theta), points.N[i], points.D[i], run, **settings)
                     for i, run in enumerate(runs)])


@each_law
def test_a_law_is_its_formula(law):
    points, theta = some_points(), np.array(THETAS[law])
    chex.assert_trees_all_close(law.predict(theta, points), by_loop(FORMULAS[law], theta, points), rtol=1e-13)


def test_effective_experts_saturate():
    law, points, theta = JointExperts(start=2.0, limit=200.0), some_points(), np.array(THETAS[JOINT_EXPERTS])
    expected = by_loop(joint, theta, points, start=2.0, limit=200.0)
    chex.assert_trees_all_close(law.predict(theta, points), expected, rtol=1e-13)
    chex.assert_trees_all_close(law.effective(np.array([1.0, 1e12])), np.array([2.0, 200.0]), rtol=1e-6)
    experts = np.array([1.0, 2.0, 64.0])
    chex.assert_trees_all_close(JOINT_EXPERTS.effective(experts), experts, rtol=1e-14)


@pytest.mark.parametrize("settings, told", [({"start": 0.5}, "start = 0.5"), ({"start": 3.0, "limit": 2.0}, "limit")])
def test_effective_experts_have_bounds_that_make_sense(settings, told):
    with pytest.raises(ValueError, match=told):
        JointExperts(**settings)


@each_law
def test_jacobians_are_those_of_the_terms(law):
    points, theta = some_points(), np.array(THETAS[law])
    _, jacobians = law.log_terms(theta, points)
    differences = [(law.log_terms(theta + step, points)[0] - law.log_terms(theta - step, points)[0]) / 2e-6
                   for step in 1e-6 * np.eye(len(theta))]
    chex.assert_trees_all_close(np.broadcast_to(jacobians, (law.terms, len(points), len(theta))),
                                np.stack(differences, -1), atol=1e-7)


@each_law
def test_the_objective_is_a_sum_over_runs_and_its_gradient_is_its_own(law):
    theta = np.array(THETAS[law])
    points = some_points()
    near = Points("near", points.N, points.D, law.predict(theta, points) * np.exp(np.linspace(-2e-3, 2e-3, 14)),
                  more=points.more)  # on both sides of where the loss becomes linear
    value, gradient = objective(theta, law, near)
    expected = 0.0
    for error in np.log(by_loop(FORMULAS[law], theta, near)) - np.log(near.loss):
        expected += error ** 2 / 2 if abs(error) <= DELTA else DELTA * (abs(error) - DELTA / 2)
    assert value == pytest.approx(expected, rel=1e-9)
    differences = [(objective(theta + step, law, near)[0] - objective(theta - step, law, near)[0]) / 2e-7
                   for step in 1e-7 * np.eye(len(theta))]
    chex.assert_trees_all_close(gradient, np.array(differences), atol=1e-8)


@each_law
def test_many_thetas_at_once(law):
    points, thetas = some_points(), np.array(THETAS[law]) + 0.1 * np.arange(6).reshape(2, 3, 1)
    values, _ = law.log_terms(thetas, points)
    assert values.shape == (2, 3, law.terms, len(points))
    for i in np.ndindex(2, 3):
        chex.assert_trees_all_close(values[i], law.log_terms(thetas[i], points)[0], rtol=1e-13)
        chex.assert_trees_all_close(objective(thetas, law, points)[1][i], objective(thetas[i], law, points)[1],
                                    rtol=1e-9, atol=1e-15)


@each_law
def test_coefficients_by_name(law):
    theta = np.array(THETAS[law])
    coefficients = law.natural(theta)
    assert tuple(coefficients) == law.names and len(theta) == len(law.names)
    expected = np.append(np.exp(theta[:law.terms]), theta[law.terms:])
    chex.assert_trees_all_close(np.array(list(coefficients.values())), expected, rtol=1e-15)
    assert law.natural(np.tile(theta, (3, 1)))[law.names[0]].shape == (3,)
    assert law.natural(np.full(len(theta), -1e4))[law.names[0]] == 0  # and no warning


def test_the_published_starts():
    starts = DENSE.starts()
    assert starts.shape == (4500, 5) and len(np.unique(starts, axis=0)) == 4500
    chex.assert_trees_all_equal(starts.max(0), np.array([25, 25, 1, 2, 2.0]))


def test_where_laws_meet():
    """One expert, one pass: the dense law; a pass worth as much as parameters: the dense law of unrolled size."""
    points, theta = some_points(), np.array(THETAS[DENSE])
    one = Points("one", points.N, points.D, points.loss, more={"experts": np.ones(len(points))})
    joint_theta = np.array([*theta[:3], -theta[3], 0.7, 0.9, -theta[4], 0.3, 0.2])
    chex.assert_trees_all_close(JOINT_EXPERTS.predict(joint_theta, one), DENSE.predict(theta, points), rtol=1e-13)
    more = points.more
    for phi, size in ((0.0, more["N_once"] + more["N_recurring"]),
                      (1.0, more["N_once"] + more["recursions"] * more["N_recurring"])):
        unrolled = Points("unrolled", size, points.D, points.loss)
        chex.assert_trees_all_close(RECURSIVE.predict(np.append(theta, phi), points), DENSE.predict(theta, unrolled),
                                    rtol=1e-13)
