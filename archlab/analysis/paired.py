"""What a few seeds allow to say: intervals, and differences seed by seed."""

import math
import statistics
from collections.abc import Sequence


def half_interval(values: Sequence[float]) -> float:
    """Half of a 95% interval of the mean (Student's t); nan for fewer than two values, or one that is not finite."""
    from scipy.stats import t

    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def told_apart(better: str, worse: str, gaps: Sequence[float], unit: str = "bits/byte") -> str:
    """In words, whether `better` is. gaps: for each seed, by how much `worse` has more of the loss.

    Runs of one seed read the same text in the same order, so it is their differences that an interval is made of; where
    it holds 0 the two are not told apart.
    """
    gap, noise = statistics.fmean(gaps), half_interval(gaps)
    said = "is better than" if gap > noise else "is WORSE than" if gap < -noise else "is not told apart from"
    return f"{better!r} {said} {worse!r} ({gap:+.4f} {unit}, +- {noise:.4f})"
