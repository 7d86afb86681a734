"""What is found of one architecture: its law with resampled ones, its isoFLOP parabolas, how well it foretells.

An architecture whose points no law can be fitted to is a study too, with the reason; others are not held up by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from archlab.analysis.scaling.bootstrap import Sample, bootstrap
from archlab.analysis.scaling.envelope import envelope
from archlab.analysis.scaling.fit import Fit, fit
from archlab.analysis.scaling.frontier import Multiplier, exponents, multiplier, optimum
from archlab.analysis.scaling.holdout import Holdout, holdout
from archlab.analysis.scaling.isoflop import Parabola, parabolas, power_laws
from archlab.analysis.scaling.laws import DENSE, Law
from archlab.analysis.scaling.points import Points

AHEAD = 10.0  # how far beyond the largest compute a law is asked, and then flagged


@dataclass(frozen=True, eq=False)
class Study:
    """refused: why there is no fit, no sample (then both are None); unheld: why there is no holdout."""

    points: Points
    fit: Fit | None = None
    sample: Sample | None = None
    holdout: Holdout | None = None
    parabolas: Sequence[Parabola] = ()
    refused: str = ""
    unheld: str = ""

    def spread(self) -> float:
        """The typical relative distance of a loss from the law: the standard deviation of the residuals, with a degree
        of freedom less for each coefficient. nan where as many points as coefficients leave none."""
        free = len(self.points) - len(self.fit.theta)
        return float(np.sqrt(np.sum(self.fit.residuals**2) / free)) if free > 0 else float("nan")


def study(points: Points, repetitions: int = 1000, by: str = "residuals", seed: int = 0, law: Law = DENSE) -> Study:
    """Fits the law to the points, and resamples it `repetitions` times `by` runs or residuals. ValueError for settings
    that `bootstrap` does not have."""
    curves = parabolas(points) if law == DENSE else ()  # of N and D alone
    try:
        fitted = fit(points, law)
    except ValueError as error:
        return Study(points, parabolas=curves, refused=str(error))
    if by == "residuals" and len(points) <= len(fitted.theta):
        return Study(points, parabolas=curves, refused=f"{len(points)} runs for {len(fitted.theta)} coefficients leave "
                     "no residuals to resample, and so no interval: must be more runs")
    sample = bootstrap(fitted, repetitions, by=by, seed=seed)
    try:
        held, unheld = holdout(points, law), ""
    except ValueError as error:
        held, unheld = None, str(error)
    return Study(points, fitted, sample, held, curves, unheld=unheld)


def compared(studies: Mapping[str, Study], reference: str, count: int | None = None) -> dict[str, Multiplier]:
    """Compute multipliers over the reference of all others that have a fit, at `count` losses over the range that both
    reached (by default those of `multiplier`)."""
    found = {}
    for name, one in studies.items():
        if name != reference and one.fit and studies[reference].fit:
            found[name] = multiplier(one.sample, studies[reference].sample)
            if count and len(found[name].losses):
                losses = np.linspace(*found[name].losses[[0, -1]], count)
                found[name] = multiplier(one.sample, studies[reference].sample, losses)
    return found


def coefficients(one: Study) -> list[dict]:
    """A row for each coefficient of a law, and for the dense one also for the exponents a and b of N_opt ~ C^a and
    D_opt ~ C^b: its value and the resampled interval and standard error."""
    law, sample = one.fit.law, one.sample
    more = exponents if law == DENSE else lambda theta: ()
    everything = lambda theta: np.stack([*law.natural(theta).values(), *more(theta)], -1)
    columns = everything(one.fit.theta), *sample.interval_of(everything), sample.standard_error_of(everything)
    return [{"architecture": one.points.name, "law": law.name, "coefficient": name, "value": value, "low": low,
             "high": high, "standard_error": error}
            for name, value, low, high, error in zip((*law.names, "a", "b"), *columns)]


def allocations(one: Study, budgets: Sequence[float] = ()) -> list[dict]:
    """Optimal N, D and loss with intervals for each budget: by default four over the compute of the runs and two beyond
    it, the last ten times their largest. extrapolated: which of C, N and D lie outside of the runs ("" for none)."""
    points = one.points
    least, most = points.C.min(), points.C.max()
    C = np.array(budgets or [*np.geomspace(least, most, 4), most * AHEAD**0.5, most * AHEAD])
    N, D, loss = optimum(one.fit.theta, C)
    low, high = one.sample.interval_of(lambda theta: np.stack(optimum(theta, C), -1))
    out = {key: (values > 1.001 * seen.max()) | (values < seen.min() / 1.001)
           for key, values, seen in (("C", C, points.C), ("N", N, points.N), ("D", D, points.D))}
    return [{"architecture": points.name, "FLOPs": C[i], "N": N[i], "N_low": low[i, 0], "N_high": high[i, 0],
             "D": D[i], "D_low": low[i, 1], "D_high": high[i, 1], "tokens_per_parameter": D[i] / N[i],
             "loss": loss[i], "loss_low": low[i, 2], "loss_high": high[i, 2],
             "extrapolated": ", ".join(key for key in out if out[key][i])} for i in range(len(C))]


def by_approach(one: Study) -> list[dict]:
    """The exponent a of N_opt ~ C^a by approach 3, the fitted law, and for comparison by 2, the minima of isoFLOP
    parabolas, and 1, the envelope of all runs (Hoffmann et al. 2022, arXiv:2203.15556)."""
    rows = []
    if one.fit:
        rows += [row | {"approach": "3: fitted law"} for row in coefficients(one) if row["coefficient"] == "a"]
    for approach, of in (("2: isoFLOP minima", lambda: power_laws(one.parabolas)[0]),
                         ("1: envelope", lambda: envelope(one.points).N_law)):
        try:
            law = of()
            rows.append({"value": law.exponent, "low": law.low, "high": law.high, "approach": approach})
        except ValueError:
            pass  # too few minima, or too few runs on the envelope: then there is no such row
    return [{"architecture": one.points.name} | row for row in rows]


def by_convention(points: Points) -> dict[str, float | None]:
    """The exponent a of N_opt ~ C^a by each way of counting N that the table has (its columns "N:..."); None where no
    law can be fitted to it."""
    found = {}
    for column in points.more:
        if column.startswith("N:"):
            try:
                found[column[2:]] = float(exponents(fit(replace(points, N=points.more[column])).theta)[0])
            except ValueError:
                found[column[2:]] = None
    return found
