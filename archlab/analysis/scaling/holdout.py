"""How well a law foretells: the largest budget is left out, the law is fitted to the rest and asked about it."""

from dataclasses import dataclass

import numpy as np

from archlab.analysis.scaling.fit import Fit, fit
from archlab.analysis.scaling.laws import DENSE, Law
from archlab.analysis.scaling.points import Points


@dataclass(frozen=True, eq=False)
class Holdout:
    """left_out: the runs of the largest budget. fit: of the others. predicted, observed: losses of left_out, [n]."""

    left_out: Points
    fit: Fit
    predicted: np.ndarray

    @property
    def observed(self) -> np.ndarray:
        return self.left_out.loss

    @property
    def error(self) -> np.ndarray:
        """How far each prediction is above what was observed, relative to it, [n]."""
        return self.predicted / self.observed - 1

    @property
    def mean_error(self) -> float:
        """The mean of |error|."""
        return float(np.abs(self.error).mean())

    @property
    def bias(self) -> float:
        """The mean of error: above 0 where the law was too pessimistic."""
        return float(self.error.mean())


def holdout(points: Points, law: Law = DENSE) -> Holdout:
    """Predicts the largest budget from the others; without budgets, the tenth of the runs with the most compute.

    ValueError where the rest is too little to fit the law to.
    """
    if not len(points):
        raise ValueError(f"{points.name}: no runs to leave out")
    grouped = np.isfinite(points.budget).all()
    compute = points.budget if grouped else points.C
    largest = compute >= np.quantile(compute, 1.0 if grouped else 0.9) * (1 - 1e-9)  # 6 N D has its round-off
    rest, left_out = points.take(~largest), points.take(largest)
    try:
        fitted = fit(rest, law)
    except ValueError as error:
        raise ValueError(f"{points.name}: without the {len(left_out)} runs of the most compute ({compute.max():.3g} "
                         f"FLOPs) {len(rest)} remain, too little for a law ({error})") from error
    return Holdout(left_out, fitted, fitted.predict(left_out))
