"""How far coefficients would move were the runs drawn again: the bootstrap, a thousand refits at once.

Two ways, by what is by chance. "runs": which runs there are; they are drawn with replacement (Besiroglu et al. 2024,
arXiv:2404.10102). For many runs scattered over sizes and budgets. "residuals": what each run's loss came out as; sizes
and tokens stay, and noise of the residuals' kind is added to the fitted law. For a designed grid of a dozen or two,
which drawing runs would leave with too few sizes. It takes the noise to be alike in all runs, in relative terms.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from archlab.analysis.scaling.fit import Fit
from archlab.analysis.scaling.newton import minimise

WAYS = ("runs", "residuals")
LEVEL = 0.95  # of intervals
SMOOTHING = 0.5  # of the drawn residuals, in their standard deviations


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A fit and its refits: thetas [R, P]."""

    fit: Fit
    thetas: np.ndarray

    def interval(self, name: str, level: float = LEVEL) -> tuple[float, float]:
        """Of a coefficient, between percentiles. ValueError for a coefficient that the law does not have."""
        if name not in self.fit.law.names:
            raise ValueError(f"coefficient = {name!r}: must be one of {', '.join(self.fit.law.names)}")
        return self.interval_of(lambda thetas: self.fit.law.natural(thetas)[name], level)

    def interval_of(self, function: Callable[[np.ndarray], np.ndarray], level: float = LEVEL) \
            -> tuple[np.ndarray, np.ndarray]:
        """Of what `function` makes of thetas [R, P]: [R, ...], and the ends [...]. They are values that were drawn,
        never means of two, which infinity would swallow; what is not determined is not counted."""
        if not 0 < level < 1:
            raise ValueError(f"level = {level}: must be between 0 and 1, such as 0.95")
        drawn, tail = function(self.thetas), (1 - level) / 2
        return (np.nanquantile(drawn, tail, axis=0, method="lower"),
                np.nanquantile(drawn, 1 - tail, axis=0, method="higher"))

    def standard_error_of(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Of the same; nan where something is infinite, which leaves none."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.std(function(self.thetas), axis=0, ddof=1)


def bootstrap(fit: Fit, repetitions: int = 1000, by: str = "runs", seed: int = 0) -> Sample:
    """Refits the law to runs drawn again.

    Each refit searches from the optimum; by runs, where so few may be left that there are several optima, again from
    where another repetition's refit ended. by: "runs" or "residuals", see above.
    ValueError for another way, fewer than two repetitions, and residuals of as many coefficients as runs.
    """
    if repetitions < 2:
        raise ValueError(f"repetitions = {repetitions}: must be at least 2, better 1000")
    if by not in WAYS:
        raise ValueError(f"by = {by!r}: must be one of {', '.join(WAYS)}")
    rng = np.random.default_rng(seed)
    target, weights = (_runs if by == "runs" else _residuals)(fit, repetitions, rng)
    terms = fit.law.at(fit.points)
    thetas, objectives = minimise(terms, np.tile(fit.theta, (repetitions, 1)), target, weights)
    if by == "runs":
        others, theirs = minimise(terms, np.roll(thetas, 1, 0), target, weights)
        thetas = np.where((theirs < objectives)[:, None], others, thetas)
    return Sample(fit, thetas)


def _runs(fit, repetitions, rng):
    """The runs' own log losses, and how often each is drawn: both [R, n]."""
    n = len(fit.points)
    weights = rng.multinomial(n, np.full(n, 1 / n), repetitions).astype(np.float64)
    return np.tile(np.log(fit.points.loss), (repetitions, 1)), weights


def _residuals(fit, repetitions, rng):
    """Log losses that the law and noise would give, and weights of one: both [R, n].

    Residuals are smaller than the noise, for the fit went after it: it passes as good as through P of the runs. So
    their shape alone is drawn, smoothed over the zeros there, and its scale from what n - P runs leave open about it,
    which makes intervals those of Student's t rather than too narrow ones.
    """
    n, P = len(fit.points), len(fit.theta)
    if n <= P:
        raise ValueError(f"by = 'residuals': {fit.points.name} has {n} runs for {P} coefficients, so there is no noise "
                         "to be seen; must have more runs")
    residuals = fit.residuals
    square = np.square(residuals).sum()
    centred = residuals - residuals.mean()
    centred /= np.sqrt(np.square(centred).mean()).clip(1e-300)
    drawn = centred[rng.integers(n, size=(repetitions, n))] + SMOOTHING * rng.normal(size=(repetitions, n))
    scale = np.sqrt(square / rng.chisquare(n - P, size=(repetitions, 1)) / (1 + SMOOTHING ** 2))
    return np.log(fit.predict(fit.points)) + scale * drawn, np.ones((repetitions, n))
