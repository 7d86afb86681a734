"""IsoFLOP parabolas: at equal compute, loss over log N has a minimum (Hoffmann et al. 2022, arXiv:2203.15556, section
3.2, approach 2).

They are for the picture. Numbers are taken from the fitted law: its isoFLOP curve is no parabola in log N, so the
minimum is off even without noise, unless alpha = beta and the sizes tried lie evenly about the optimum; and where they
lie to one side of it, by more at one budget than at another, the exponents are off, too (arXiv:2603.22339).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from archlab.analysis.scaling.points import Points
from archlab.analysis.scaling.power_law import PowerLaw, power_law


EQUAL = 1.1  # times: runs whose compute is no further than this from their budget are at it but for rounding


class Parabola(NamedTuple):
    """loss = c0 + c1 log N + c2 (log N)^2 at one budget.

    C: 6 N D at the minimum. It is the budget, unless N is counted by another convention than budgets are: then 6 N D
    differs within a group, and C lies between that of the sizes next to the minimum (at an end, or in the middle where
    there is no minimum between). N_opt, loss_opt: the minimum, nan where it opens downwards. inside: whether that lies
    among the sizes tried; where it does not it says no more than on which side to look.
    """

    budget: float
    C: float
    coefficients: tuple[float, float, float]
    N_opt: float
    loss_opt: float
    inside: bool

    @property
    def D_opt(self) -> float:
        return self.C / (6 * self.N_opt)

    def loss_at(self, N: np.ndarray) -> np.ndarray:
        """The parabola's loss for models of N parameters."""
        return np.polynomial.Polynomial(self.coefficients)(np.log(N))


def parabolas(points: Points) -> list[Parabola]:
    """One for each budget with at least three sizes, the least first; none where runs have no budgets."""
    found = []
    for budget in np.unique(points.budget[np.isfinite(points.budget)]):
        group = points.take(points.budget == budget)
        if np.unique(group.N).size >= 3:
            found.append(_parabola(float(budget), group))
    return found


def power_laws(parabolas: Sequence[Parabola]) -> tuple[PowerLaw, PowerLaw]:
    """N_opt ~ C^a and D_opt ~ C^b through the minima that lie inside the sizes tried. ValueError for fewer than two."""
    inside = [p for p in parabolas if p.inside]
    if len(inside) < 2:
        raise ValueError(f"{len(inside)} of {len(parabolas)} isoFLOP parabolas have their minimum inside the sizes "
                         "tried: a power law needs at least two")
    C = [p.C for p in inside]
    return power_law(C, [p.N_opt for p in inside]), power_law(C, [p.D_opt for p in inside])


def _parabola(budget: float, group: Points) -> Parabola:
    middle = np.log(group.N).mean()  # about which the sums keep their digits
    x = np.log(group.N) - middle
    c0, c1, c2 = np.polynomial.polynomial.polyfit(x, group.loss, 2)
    lowest = -c1 / (2 * c2) if c2 > 0 else np.nan
    about_zero = (c0 - c1 * middle + c2 * middle**2, c1 - 2 * c2 * middle, c2)
    return Parabola(budget, _compute(budget, group, x, lowest), tuple(map(float, about_zero)),
                    float(np.exp(lowest + middle)), float(c0 + c1 * lowest / 2), bool(x.min() < lowest < x.max()))


def _compute(budget: float, group: Points, x: np.ndarray, lowest: float) -> float:
    """A group's 6 N D at the minimum, which is at x = lowest; x [n] is log N about its mean."""
    if np.abs(np.log(group.C / budget)).max() <= np.log(EQUAL):
        return budget
    sizes, which = np.unique(x, return_inverse=True)
    log_C = np.bincount(which, np.log(group.C)) / np.bincount(which)
    return float(np.exp(np.interp(np.nan_to_num(lowest), sizes, log_C)))
