"""A power law through a few points: least squares in the logarithms."""

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import t


class PowerLaw(NamedTuple):
    """y = factor x^exponent. low, high: the exponent's 95% interval (Student's t; nan for two points, which leave
    nothing to judge by). It knows the scatter about the line, not what bends or shifts all of the points."""

    factor: float
    exponent: float
    low: float
    high: float

    def __call__(self, x):
        return self.factor * np.asarray(x, np.float64) ** self.exponent


def power_law(x: np.ndarray, y: np.ndarray) -> PowerLaw:
    """The power law through x, y [n]. ValueError for fewer than two values of x, or what is no positive number."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not ((x > 0) & (y > 0) & np.isfinite(x) & np.isfinite(y)).all():
        raise ValueError(f"x = {x}, y = {y}: a power law needs positive numbers")
    if np.unique(x).size < 2:
        raise ValueError(f"x = {x}: a power law needs at least two values")
    x, y = np.log(x), np.log(y)
    away = x - x.mean()
    exponent = (away * y).sum() / (away**2).sum()
    factor = math.exp(y.mean() - exponent * x.mean())
    free = x.size - 2
    if not free:
        return PowerLaw(factor, float(exponent), math.nan, math.nan)
    scatter = y - y.mean() - exponent * away
    half = t.ppf(0.975, free) * math.sqrt((scatter**2).sum() / free / (away**2).sum())
    return PowerLaw(factor, float(exponent), float(exponent - half), float(exponent + half))
