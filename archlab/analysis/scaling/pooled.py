"""One law for several architectures: mixtures of 1, 2, 4 ... experts, or models of 1, 2, 4 ... recursions, in one fit.

The laws for that have one coefficient or more for what differs between them. They take for granted that nothing else
does; where it does, an architecture's runs lie to one side of the law.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from archlab.analysis.scaling.fit import check
from archlab.analysis.scaling.frontier import optimum
from archlab.analysis.scaling.laws import DENSE, FINE_GRAINED, JOINT_EXPERTS, LAWS, RECURSIVE, Law
from archlab.analysis.scaling.points import Points
from archlab.analysis.scaling.study import Study, coefficients, study
from archlab.layers.config import near

NAMED = {law.name.replace(" ", "-"): law for law in LAWS}
ACTIVE = "N:6N"  # the column of active parameters, in tables that count N in several ways
ALIKE = 1.05  # times: settings no further apart are one; experts are rounded to whole channels
RATES = 1.25  # times: expansion rates no further apart are one
BUDGETS = 3


@dataclass(frozen=True, eq=False)
class Pooled:
    """A law over several architectures. study: of all their runs; its `refused` says why there is no fit. parts: each
    architecture's own runs, beside the law of all. counted: what N is, in words."""

    law: Law
    study: Study
    parts: Mapping[str, Study]
    counted: str

    @property
    def dial(self) -> str:
        """The column that tells the architectures apart."""
        return self.law.needs[0]


def law_named(name: str) -> Law:
    """By its name with hyphens, as "fine-grained-experts"; ValueError for another."""
    if name not in NAMED:
        raise ValueError(f"must be one of {', '.join(NAMED)}; {near(name, NAMED)}")
    return NAMED[name]


def pooled(parts: Mapping[str, Points], law: Law, repetitions: int = 1000, by: str = "residuals",
           seed: int = 0) -> Pooled:
    """Fits one law to the runs of all architectures, and resamples it as `study` does.

    For laws of experts N is the column "N:6N" where the table has it: the parameters that multiply on a token. The
    recursive law has columns of its own for parameters, and N stays what compute is counted by.
    ValueError for the dense law, which is each architecture's own, and for settings that `bootstrap` does not have.
    """
    if law == DENSE:
        raise ValueError(f"law = {law.name!r}: is of one architecture; for several it must be one of "
                         f"{', '.join(name for name in NAMED if NAMED[name] != DENSE)}")
    counted = "the unique parameters are N_once + N_recurring, and N says only what compute is"
    if law != RECURSIVE:
        known = all(ACTIVE in points.more for points in parts.values())
        parts = {name: replace(p, N=p.more[ACTIVE]) if known else p for name, p in parts.items()}
        counted = ("N is 6N: active parameters with the head, without what is only looked up" if known else
                   "N is taken as the table gives it, for the active parameters")
    points = joined(parts)
    refused = _unfit(points, law)
    one = Study(points, refused=refused) if refused else study(points, repetitions, by, seed, law)
    beside = {name: Study(p, one.fit and replace(one.fit, points=p)) for name, p in parts.items()}
    return Pooled(law, one, beside, counted)


def joined(parts: Mapping[str, Points]) -> Points:
    """All runs in one, labelled with their architecture; further columns are those that all of them have."""
    join = lambda of: np.concatenate([of(points) for points in parts.values()])
    shared = set.intersection(*(set(points.more) for points in parts.values()))
    return Points(", ".join(parts), join(lambda p: p.N), join(lambda p: p.D), join(lambda p: p.loss),
                  join(lambda p: p.budget),
                  tuple(f"{name}: {label}" for name, p in parts.items() for label in p.labels),
                  {key: join(lambda p: p.more[key]) for key in sorted(shared)})


def settings(one: Pooled) -> list[dict]:
    """For each number of experts (or granularity, or recursions) that was run: the loss that the law expects in the
    middle of the runs, and by how much, with its interval, that lies below the one of the least such number at equal
    parameters and D."""
    middle = typical(one)
    loss = lambda theta: one.law.predict(theta, middle)
    saved = lambda theta: loss(theta)[..., :1] - loss(theta)
    theta, (low, high) = one.study.fit.theta, one.study.sample.interval_of(saved)
    return [{one.dial: level, "loss": loss(theta)[i], "saved": saved(theta)[i], "low": low[i], "high": high[i]}
            for i, level in enumerate(middle.more[one.dial])]


def worth(one: Pooled, recursions: float) -> tuple[float, float, float]:
    """By how many times the recurring parameters count, r^phi: the value and its interval. For the recursive law."""
    phi = next(row for row in coefficients(one.study) if row["coefficient"] == "phi")
    return tuple(float(recursions ** phi[key]) for key in ("value", "low", "high"))


def best_experts(one: Pooled) -> list[dict]:
    """For budgets over the compute that all numbers of experts were run with: the number whose loss is least, each at
    its own best N and D among the sizes that were run; its interval, and the share of resampled laws that agree.
    Only for the joint law; empty where no compute is in common."""
    if one.law != JOINT_EXPERTS:
        return []
    points, levels = one.study.points, _levels(one.study.points.more["experts"])
    mine = [points.take(_at(points.more["experts"], level)) for level in levels]
    least, most = max(p.C.min() for p in mine), min(p.C.max() for p in mine)
    if least >= most:
        return []
    C = np.geomspace(least, most, BUDGETS)
    losses = lambda theta: np.stack([optimum(_dense(theta, level), C, (p.N.min(), p.N.max()))[2]
                                     for level, p in zip(levels, mine)], -1)
    best = lambda theta: levels[np.argmin(np.nan_to_num(losses(theta), nan=np.inf), -1)]
    found, (low, high) = best(one.study.fit.theta), one.study.sample.interval_of(best)
    agree = (best(one.study.sample.thetas) == found).mean(0)
    return [{"FLOPs": C[i], "experts": found[i], "low": low[i], "high": high[i], "agree": agree[i]}
            for i in range(BUDGETS)]


def leaning(part: Study) -> tuple[float, float]:
    """By how much an architecture's runs lie above the law of all, in the mean, and that mean's standard error."""
    above = np.expm1(part.fit.residuals)
    return float(above.mean()), float(above.std(ddof=1) / len(above)**0.5) if len(above) > 1 else float("nan")


def span(values: np.ndarray) -> str:
    """Settings in words: one number, or from the least to the largest."""
    low, high = values.min(), values.max()
    return f"{low:.3g}" if high <= ALIKE * low else f"{low:.3g} to {high:.3g}"


def typical(one: Pooled) -> Points:
    """Models in the geometric middle of the runs, one for each setting."""
    points, levels = one.study.points, _levels(one.study.points.more[one.dial])
    inside = points.more["N_recurring"] > 0 if one.law == RECURSIVE else np.full(len(points), True)
    middle = lambda values: np.full(len(levels), np.exp(np.log(values[inside]).mean()))
    with np.errstate(divide="ignore"):  # nothing may be outside of the recursions
        more = {name: middle(points.more[name]) for name in one.law.needs[1:]} | {one.dial: levels}
    return Points("typical", middle(points.N), middle(points.D), np.ones(len(levels)), more=more)


def _unfit(points: Points, law: Law) -> str:
    """Why a law cannot be told from these runs; or nothing."""
    try:
        check(points, law)
    except ValueError as error:
        return str(error)
    about = f"{points.name}: the {law.name} law, {law.formula},"
    if law == FINE_GRAINED:
        granularity = points.more["granularity"]
        if len(levels := _levels(granularity)) < 3:
            return (f"{about} on granularity = {' and '.join(f'{level:.3g}' for level in levels)}: must be at least 3 "
                    "different, since g, a and gamma go through any two")
        rates = points.more["experts"] / granularity if "experts" in points.more else np.ones(len(points))
        if rates.max() > RATES * rates.min():
            return (f"{about} is of one expansion rate, experts over granularity: must be the same in all runs, and is "
                    f"{span(rates)} (dense models are not in this law)")
    if law == RECURSIVE:
        empty = (points.more["recursions"] > 1) & (points.more["N_recurring"] == 0)
        if empty.any():
            return (f"{about} on N_recurring = 0 with recursions = {points.more['recursions'][empty][0]:g} in "
                    f"{points.labels[np.argmax(empty)]}: must be above 0")
    return ""


def _dense(theta: np.ndarray, experts: float) -> np.ndarray:
    """The dense law that the joint one is for a number of experts: its theta [..., 5]."""
    a, b, c, alpha, gamma, delta, beta, zeta, omega = np.moveaxis(theta, -1, 0)
    E = np.log(JOINT_EXPERTS.effective(experts))
    return np.stack([a + delta * E, b + omega * E, c, -(alpha + gamma * E), -(beta + zeta * E)], -1)


def _levels(values: np.ndarray) -> np.ndarray:
    """The settings among values, in order: means of those that are alike."""
    values = np.sort(values)
    groups = np.split(values, np.flatnonzero(np.diff(np.log(values)) > np.log(ALIKE)) + 1)
    return np.array([group.mean() for group in groups])


def _at(values: np.ndarray, level: float) -> np.ndarray:
    """Which of values are alike to a level."""
    levels = _levels(values)
    return np.abs(np.log(values)[:, None] - np.log(levels)).argmin(-1) == np.argmin(np.abs(levels - level))


