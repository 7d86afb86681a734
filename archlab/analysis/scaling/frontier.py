"""The compute-optimal frontier of the dense law L = E + A / N^alpha + B / D^beta, and architectures compared on it.

With C = 6 N D the least loss for a compute C is at N = G (C/6)^(beta/(alpha+beta)), D = (C/6)^(alpha/(alpha+beta)) / G,
G = (alpha A / (beta B))^(1/(alpha+beta)) (Hoffmann et al. 2022, arXiv:2203.15556, section 3.3 and appendix D.3), and is
E + K (C/6)^(-alpha beta/(alpha+beta)): a closed form either way. Here theta is [..., 5], the law's (log A, log B,
log E, alpha, beta), and results have theta's leading axes, then those of the compute or loss asked about.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from archlab.analysis.scaling.bootstrap import LEVEL, Sample
from archlab.analysis.scaling.laws import DENSE

ASKED = 5  # losses, or budgets, over the common range where none are given
CHOICES = 50  # sizes among which the one of least compute is looked for


def exponents(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of N_opt ~ C^a and D_opt ~ C^b; they add up to 1."""
    alpha, beta = np.moveaxis(np.asarray(theta, np.float64), -1, 0)[3:]
    return beta / (alpha + beta), alpha / (alpha + beta)


def optimum(theta: np.ndarray, C: np.ndarray, sizes: tuple[float, float] | None = None) \
        -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, D, loss) of the least loss for a compute C, in FLOPs. sizes: the least and the largest N there is to choose
    from; any by default."""
    a, b, E, alpha, beta, C = _spread(theta, C)
    with np.errstate(all="ignore"):
        log_G, log_ND, both = (np.log(alpha / beta) + a - b) / (alpha + beta), np.log(C / 6), alpha + beta
        N, D = np.exp(beta / both * log_ND + log_G), np.exp(alpha / both * log_ND - log_G)
        if sizes is None:
            return N, D, np.exp(E) + np.exp(_log_K(a, b, alpha, beta) - alpha * beta / both * log_ND)
        # At an end where the best size lies beyond it, or where the law has none.
        choice = np.stack(np.broadcast_arrays(sizes[0], sizes[1], np.clip(N, *sizes)))
        loss = np.exp(E) + np.exp(a - alpha * np.log(choice)) + np.exp(b - beta * np.log(C / (6 * choice)))
        best = np.argmin(np.where(np.isnan(loss), np.inf, loss), 0)[None]
        N, loss = (np.take_along_axis(values, best, 0)[0] for values in (choice, loss))
        return N, C / (6 * N), loss


def compute_for(theta: np.ndarray, loss: np.ndarray, sizes: tuple[float, float] | None = None) -> np.ndarray:
    """The least compute in FLOPs with which the law reaches a loss; infinite where it never does, as at or below E.
    sizes: as for `optimum`."""
    a, b, E, alpha, beta, loss = _spread(theta, loss)
    with np.errstate(all="ignore"):
        above = np.log(np.maximum(loss - np.exp(E), 0))
        free = 6 * np.exp((_log_K(a, b, alpha, beta) - above) * (alpha + beta) / (alpha * beta))
        free = np.where((above > -np.inf) & (alpha > 0) & (beta > 0) & ~np.isnan(free), free, np.inf)
        if sizes is None:
            return free
        # At N the tokens' term must come down to what E and the parameters' term leave of the loss. Where the best N
        # of all is among the sizes, it is known; else it is at an end, which the choices hold.
        N = np.geomspace(*sizes, CHOICES).reshape(-1, *[1] * np.ndim(a + loss))
        left = loss - np.exp(E) - np.exp(a - alpha * np.log(N))
        C = 6 * N * np.exp((b - np.log(np.maximum(left, 0))) / beta)
        C = np.where((left > 0) & (beta > 0) & ~np.isnan(C), C, np.inf)
        best = np.exp((np.log(alpha / beta) + a - b + beta * np.log(free / 6)) / (alpha + beta))
        return np.where((sizes[0] <= best) & (best <= sizes[1]), free, np.min(C, 0))


@dataclass(frozen=True, eq=False)
class Comparison:
    """Architecture `a` held against `b`: value, low and high are [n], with `at` (losses or budgets); the interval is
    one of 95% over independent bootstrap samples of both. Empty, with the reason, where nothing can be compared."""

    a: str
    b: str
    at: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    reason: str = ""

    neutral = 0.0

    @property
    def verdicts(self) -> tuple[str, ...]:
        """One in words for each of `at`."""
        return tuple(self._said(value, low, high) if self._told_apart(low, high) else
                     f"{_open(low, high)} ({_range(low, high)})"
                     for value, low, high in zip(self.value, self.low, self.high))

    @property
    def verdict(self) -> str:
        """In words, where compute is largest; and where it is smallest if that differs in more than numbers."""
        if not len(self.at):
            return f"not comparable: {self.reason}"
        signs = [self._told_apart(low, high) * np.sign(value - self.neutral)
                 for value, low, high in zip(self.value, self.low, self.high)]
        last, first = (f"{self.verdicts[i]} at {self._place(self.at[i])}" for i in (-1, 0))
        return last if signs[0] == signs[-1] else f"{last}; {first}"

    def _told_apart(self, low: float, high: float) -> bool:
        return not low <= self.neutral <= high


class Multiplier(Comparison):
    """How many times the compute that `b` needs `a` needs, at equal loss: below 1 where `a` saves. Compute grows from
    the first loss to the last."""

    neutral = 1.0

    @property
    def losses(self) -> np.ndarray:
        return self.at

    @property
    def ratio(self) -> np.ndarray:
        return self.value

    def _said(self, ratio, low, high) -> str:
        return f"{self.a} needs {_short(ratio)} x the compute of {self.b} ({_range(low, high)})"

    def _place(self, loss) -> str:
        return f"loss {loss:.4g}"


class Gap(Comparison):
    """By how much the loss of `a` is above that of `b` at equal compute: negative where `a` is better."""

    @property
    def budgets(self) -> np.ndarray:
        return self.at

    @property
    def difference(self) -> np.ndarray:
        return self.value

    def _said(self, difference, low, high) -> str:
        side = "below" if difference < 0 else "above"
        return f"the loss of {self.a} is {_short(abs(difference))} {side} that of {self.b} ({_range(low, high)})"

    def _place(self, budget) -> str:
        return f"{budget:.3g} FLOPs"


def multiplier(a: Sample, b: Sample, losses: Sequence[float] | None = None) -> Multiplier:
    """The compute of `a` over that of `b` at equal loss, each at its best size of those between its smallest and its
    largest run: so nothing is said of sizes that were not tried.

    losses: where to compare; by default five over the range that both reached, which is what their frontiers give
    between the least and the most compute of their runs; empty where there is none in common. A resampled law that
    never comes down to a loss needs infinite compute for it; where neither does, the ratio counts as 0 for the lower
    bound and as infinite for the upper. ValueError for losses that not both reached, and for laws other than the dense.
    """
    names = _names(a, b)
    ends = np.array([_loss(s, s.fit.theta, [s.fit.points.C.min(), s.fit.points.C.max()]) for s in (a, b)])
    high, low = ends[:, 0].min(), ends[:, 1].max()
    reached = "; ".join(f"{name} from {ends[i, 0]:.4g} to {ends[i, 1]:.4g}" for i, name in enumerate(names))
    losses = _asked(losses, high, low, np.linspace, "losses", reached)
    if losses is None:
        return Multiplier(*names, *np.empty((4, 0)), f"their frontiers reached no loss in common ({reached})")
    with np.errstate(all="ignore"):
        ratio = np.divide(*(compute_for(s.fit.theta, losses, tried(s)) for s in (a, b)))
        drawn = np.divide(*(compute_for(thetas, losses, tried(s)) for s, thetas in zip((a, b), _paired(a, b))))
    return Multiplier(*names, losses, ratio, *_interval(drawn, 0))


def gap(a: Sample, b: Sample, budgets: Sequence[float] | None = None) -> Gap:
    """The loss of `a` less that of `b` at equal compute, each at its best size of those tried.

    budgets: FLOPs; by default five over the range in which both have runs. Otherwise as `multiplier`.
    """
    names = _names(a, b)
    ends = np.array([[s.fit.points.C.min(), s.fit.points.C.max()] for s in (a, b)])
    reached = "; ".join(f"{name} from {ends[i, 0]:.3g} to {ends[i, 1]:.3g}" for i, name in enumerate(names))
    budgets = _asked(budgets, ends[:, 0].max(), ends[:, 1].min(), np.geomspace, "budgets", reached)
    if budgets is None:
        return Gap(*names, *np.empty((4, 0)), f"their runs have no range of compute in common ({reached})")
    difference = _loss(a, a.fit.theta, budgets) - _loss(b, b.fit.theta, budgets)
    drawn = np.subtract(*(_loss(s, thetas, budgets) for s, thetas in zip((a, b), _paired(a, b))))
    return Gap(*names, budgets, difference, *_interval(drawn, -np.inf))


def tried(sample: Sample) -> tuple[float, float]:
    """The least and the largest N that was run."""
    return float(sample.fit.points.N.min()), float(sample.fit.points.N.max())


def _loss(sample: Sample, thetas: np.ndarray, C: np.ndarray) -> np.ndarray:
    return optimum(thetas, C, tried(sample))[2]


def _spread(theta: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, ...]:
    """theta's five coefficients and what is asked about, each with axes for the other's."""
    theta, asked = np.asarray(theta, np.float64), np.asarray(asked, np.float64)
    if theta.shape[-1] != len(DENSE.names):
        raise ValueError(f"theta has shape {theta.shape}: the dense law has {', '.join(DENSE.names)}")
    return *np.moveaxis(theta[..., *[None] * asked.ndim, :], -1, 0), asked


def _log_K(a, b, alpha, beta) -> np.ndarray:
    """log of K: at the optimum the tokens' term is alpha / beta of the parameters' term, A / G^alpha."""
    return (beta * a + alpha * b - alpha * np.log(alpha / beta)) / (alpha + beta) + np.log1p(alpha / beta)


def _names(a: Sample, b: Sample) -> tuple[str, str]:
    for sample in (a, b):
        if sample.fit.law != DENSE:
            raise ValueError(f"{sample.fit.points.name}: fitted by the law {sample.fit.law.name!r}; a frontier over N "
                             f"and D alone needs {DENSE.name!r}")
    return a.fit.points.name, b.fit.points.name


def _asked(values, first: float, last: float, spaced, what: str, reached: str) -> np.ndarray | None:
    """The losses or budgets to compare at, compute growing; None where there is no range in common."""
    down = what == "losses"  # they fall as compute grows
    least, most = (last, first) if down else (first, last)
    if values is None:
        return spaced(first, last, ASKED) if least < most else None
    values = np.sort(np.atleast_1d(np.asarray(values, np.float64)))[:: -1 if down else 1]
    out = ~((values >= least * (1 - 1e-9)) & (values <= most * (1 + 1e-9)))
    if out.any():
        raise ValueError(f"{what} = {values[out]}: not reached by both, {reached}")
    return values


def _paired(a: Sample, b: Sample) -> list[np.ndarray]:
    """As many resampled laws of each, so ordered that no draw of one goes with the same draw of the other."""
    count = min(len(a.thetas), len(b.thetas))
    return [a.thetas[:count], np.random.default_rng(0).permutation(b.thetas[:count])]


def _interval(drawn: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of what was drawn [R, n]. They are values that were drawn, never means of two, which infinity would
    swallow; what is not determined counts as `least` below and as infinite above."""
    tail = (1 - LEVEL) / 2
    low = np.quantile(np.where(np.isnan(drawn), least, drawn), tail, axis=0, method="lower")
    return low, np.quantile(np.where(np.isnan(drawn), np.inf, drawn), 1 - tail, axis=0, method="higher")


def _open(low: float, high: float) -> str:
    """The verdict on an interval that holds the neutral value: one without a bound tells nothing."""
    return "not distinguishable" if _bounded(low) and _bounded(high) else "undetermined, too few or too noisy runs"


def _bounded(bound: float) -> bool:
    return bool(bound != 0 and np.isfinite(bound))


def _range(low: float, high: float) -> str:
    """An interval in words; a bound of 0 or infinity is none."""
    bounded = _bounded(low), _bounded(high)
    return {(True, True): f"{_short(low)} to {_short(high)}", (True, False): f"at least {_short(low)}",
            (False, True): f"at most {_short(high)}", (False, False): "no bounds"}[bounded]


def _short(value: float) -> str:
    """Two digits behind the point where they say something."""
    return f"{value:.2f}" if 0.1 <= abs(value) < 100 else f"{value:.2g}"
