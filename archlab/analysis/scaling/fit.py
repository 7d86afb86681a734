"""Fits of a law to runs: by Huber's loss from many starts, and by variable projection, another way to the same law.

The published recipe minimises the SUM over runs of Huber's loss (1e-3) of log L - log loss by L-BFGS from a grid of
starts (Hoffmann et al. 2022, arXiv:2203.15556, section 3.3). Averaged instead of summed, the loss and its gradient are
so small that usual tolerances stop far from the optimum, which is how the published coefficients went wrong (Besiroglu
et al. 2024, arXiv:2404.10102). Here Newton's method ends every search, so that a fit is exact and does not depend on a
tolerance.
"""

import dataclasses
import itertools

import numpy as np

from archlab.analysis.scaling.laws import DENSE, Law
from archlab.analysis.scaling.newton import huber, log_loss, minimise, objective_of
from archlab.analysis.scaling.points import Points

SAME = 1e-6  # of predicted loss: two optima whose predictions agree to this are one
PARTS = ("N_once", "N_recurring")  # of the parameters
METHODS = ("newton", "l-bfgs")


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A law with its best coefficients.

    theta: [P], as the law orders it. objective: the sum of Huber's loss. arrived: the share of the searches that ended
    at this optimum; less than all is a warning.
    """

    law: Law
    points: Points
    theta: np.ndarray
    objective: float
    arrived: float

    @property
    def coefficients(self) -> dict[str, float]:
        return self.law.natural(self.theta)

    @property
    def residuals(self) -> np.ndarray:
        """log(loss) - log(fitted loss), [n]."""
        return np.log(self.points.loss) - log_loss(self.theta, self.law.at(self.points))

    @property
    def absent(self) -> tuple[str, ...]:
        """Factors whose terms add to the loss less than a millionth, or, but for the constant, the same everywhere
        (an exponent of zero). The runs say that there is no such term, not what its coefficients are."""
        values = np.exp(self.law.log_terms(self.theta, self.points)[0])
        sizes = np.append(np.ptp(values[:-1], axis=-1), values[-1].max()) / values.sum(0).min()
        return tuple(name for name, size in zip(self.law.names, sizes) if size < 1e-6)

    def predict(self, points: Points) -> np.ndarray:
        """The law's loss, [n]."""
        return self.law.predict(self.theta, points)


def fit(points: Points, law: Law = DENSE, starts: int | None = 200, method: str = "newton") -> Fit:
    """The coefficients that minimise the summed Huber loss.

    starts: how many of the law's starts are searched from, the best first; None: all. method: how a search goes down,
    "newton" (all searches at once) or "l-bfgs" (scipy's, as published: slower); Newton's steps end both.

    ValueError: see `check`; an unknown method; starts below 1.
    """
    check(points, law)
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: must be one of {', '.join(METHODS)}")
    if starts is not None and starts < 1:
        raise ValueError(f"starts = {starts}: must be 1 or more, or None for all of the law's")
    terms, target = law.at(points), np.log(points.loss)
    thetas = starting_points(points, law)[:starts]
    if method == "l-bfgs":
        thetas = _lbfgs(objective_of(terms, target), thetas)
    thetas, objectives = minimise(terms, thetas, target)
    return _chosen(law, points, thetas, best=int(np.nanargmin(objectives)))


def starting_points(points: Points, law: Law) -> np.ndarray:
    """The law's starts, [S, P], best first, each within reach of the points.

    A term that is nothing beside the loss has no gradient that would let it grow, and one that is far above it drowns
    the rest: a start's factors are moved so that each term lies between a twentieth of the typical loss and all of it.
    """
    terms, target = law.at(points), np.log(points.loss)
    thetas, typical = law.starts(), target.mean()
    sizes = terms(thetas)[0].mean(-1)
    thetas[:, :law.terms] += sizes.clip(typical - 3, typical) - sizes
    return thetas[np.argsort(huber(log_loss(thetas, terms) - target).sum(-1), kind="stable")]


def variable_projection(points: Points) -> Fit:
    """The dense law by least squares of relative errors, in two dimensions.

    For given alpha and beta the law is linear in E, A and B, which non-negative least squares gives (weighted by
    1 / loss, so that errors are relative); what is left is a search over the two exponents, on a grid and then from its
    best places. A check on `fit` that shares none of its steps; without noise they agree, with noise squares weigh
    large errors more than Huber's loss does. ValueError: see `check`.
    """
    from scipy.optimize import least_squares, nnls

    check(points, DENSE)
    N, D = np.log(points.N), np.log(points.D)
    middle = np.array([N.mean(), D.mean()])

    def projected(exponents):
        alpha, beta = exponents
        powers = [np.exp(alpha * (middle[0] - N)), np.exp(beta * (middle[1] - D)), np.ones(len(points))]
        weighed = np.stack(powers, -1) / points.loss[:, None]
        factors, _ = nnls(weighed, np.ones(len(points)))
        return factors, weighed @ factors - 1

    misfit = lambda exponents: projected(exponents)[1]
    grid = np.array(list(itertools.product(np.geomspace(0.02, 2, 20), repeat=2)))
    places = grid[np.argsort([np.square(misfit(place)).sum() for place in grid])[:10]]
    ends = [least_squares(misfit, place, jac="3-point", bounds=(1e-3, 5), x_scale=places[0], xtol=1e-15, ftol=1e-15,
                          gtol=1e-15) for place in places]
    ends.sort(key=lambda end: end.cost)
    thetas = []
    for end in ends:
        factors = np.log(projected(end.x)[0].clip(1e-300)) + np.append(end.x * middle, 0)
        thetas.append(np.concatenate([factors, end.x]))
    return _chosen(DENSE, points, np.array(thetas), best=0)


def check(points: Points, law: Law) -> None:
    """ValueError, saying what would be right, for points that cannot determine the law: columns that it needs are
    missing; values that are not finite and above zero; fewer points than coefficients; fewer than three sizes or three
    numbers of tokens; tokens in a fixed proportion to size; a column of the law's that never varies."""
    about = f"{points.name}: the {law.name} law, {law.formula},"
    missing = [name for name in law.needs if name not in points.more]
    if missing:
        raise ValueError(f"{about} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}; the points have "
                         f"N, D, loss{''.join(', ' + name for name in points.more)}")
    columns = {"N": points.N, "D": points.D, "loss": points.loss} | {name: points.more[name] for name in law.needs}
    for name, values in (columns | {"the number of parameters": law.sizes(points)}).items():
        part = name in PARTS  # which may be empty, as long as all of them are not
        wrong = np.flatnonzero(~(np.isfinite(values) & ((values >= 0) if part else (values > 0))))
        if wrong.size:
            raise ValueError(f"{points.name}: {name} = {values[wrong[0]]} in {points.labels[wrong[0]]}: must be finite "
                             f"and {'not below' if part else 'above'} 0 ({wrong.size} of {len(points)} runs are not; "
                             "leave them out)")
    if len(points) < len(law.names):
        raise ValueError(f"{about} has {len(law.names)} coefficients and there are {len(points)} runs: must be "
                         f"at least {len(law.names)}, better twice as many")
    sizes, tokens = np.log(law.sizes(points)), np.log(points.D)
    for name, values, exponent in (("sizes", sizes, "N's"), ("numbers of tokens", tokens, "D's")):
        different = _different(values)
        if different < 3:
            raise ValueError(f"{about} on {different} {name}: must be at least 3, since a power and a constant go "
                             f"through any two, so {exponent} exponent cannot be told")
    for name in law.needs:
        if name not in PARTS and np.ptp(points.more[name]) == 0:
            raise ValueError(f"{about} on {name} = {points.more[name][0]:g} alone: must vary, or its exponents cannot "
                             "be told; fit the dense law")
    if abs(np.corrcoef(sizes, tokens)[0, 1]) > 1 - 1e-9:
        raise ValueError(f"{about} on tokens that follow from the size (D = c N^k in every run): must vary on "
                         "their own, or N's and D's terms cannot be told apart; train some sizes longer or shorter")


def _different(values: np.ndarray) -> int:
    """How many there are that lie more than one percent apart; values are logarithms."""
    return 1 + int((np.diff(np.sort(values)) > 0.01).sum())


def _lbfgs(value_and_gradient, thetas: np.ndarray) -> np.ndarray:
    from scipy.optimize import minimize

    tight = {"ftol": 1e-15, "gtol": 1e-12, "maxiter": 5000, "maxfun": 20000}
    return np.array([minimize(value_and_gradient, theta, jac=True, method="L-BFGS-B", options=tight).x
                     for theta in thetas])


def _chosen(law: Law, points: Points, thetas: np.ndarray, best: int) -> Fit:
    """The end of one search as a Fit."""
    predicted = log_loss(thetas, law.at(points))
    arrived = np.abs(predicted - predicted[best]).max(-1) < SAME
    value = float(huber(predicted[best] - np.log(points.loss)).sum())
    return Fit(law, points, thetas[best], value, float(arrived.mean()))
