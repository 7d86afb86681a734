"""The lower envelope of loss over compute (Hoffmann et al. 2022, arXiv:2203.15556, section 3.1, approach 1).

Which of all runs, those stopped early included, had the least loss for its compute? On logarithmic axes the law's
frontier E + K C^-g falls and is convex, so the envelope is the falling part of the points' lower convex hull. Its
first and last points are there for want of neighbours, and noise makes it too low: luck is on the envelope, too.
"""

from typing import NamedTuple

import numpy as np

from archlab.analysis.scaling.points import Points
from archlab.analysis.scaling.power_law import PowerLaw, power_law


class Envelope(NamedTuple):
    """The runs on the envelope, in the order of compute, and N ~ C^a through them."""

    points: Points
    N_law: PowerLaw


def envelope(points: Points) -> Envelope:
    """The envelope of the points. ValueError where fewer than two runs are on it, which say nothing of an exponent."""
    chosen = points.take(_hull(np.log(points.C), np.log(points.loss)))
    if len(chosen) < 2:
        raise ValueError(f"{points.name}: {len(chosen)} of {len(points)} runs on the envelope: loss must fall with "
                         "compute over at least two")
    return Envelope(chosen, power_law(chosen.C, chosen.N))


def _hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Indices of the lower convex hull's falling part, from left to right (Andrew's monotone chain)."""
    hull = []
    for i in np.lexsort((y, x)):
        if hull and (y[i] >= y[hull[-1]]):
            continue  # more compute, and no less loss
        while len(hull) >= 2 and _above(hull[-1], hull[-2], i, x, y):
            hull.pop()
        hull.append(int(i))
    return hull


def _above(middle: int, left: int, right: int, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether the middle point lies on or above the line through the other two."""
    return (y[middle] - y[left]) * (x[right] - x[left]) >= (y[right] - y[left]) * (x[middle] - x[left])
