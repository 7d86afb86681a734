"""The laws that are fitted: loss as a sum of powers of parameters, tokens and what else an architecture varies.

Every law is L = sum_k exp(v_k), with v_k the logarithm of term k. So log L is a logsumexp and its gradient weighs the
terms' jacobians by their shares of the loss (the softmax). Coefficients come as theta [P]: first the logarithm of each
term's own factor, in the order of the terms, then the exponents as they are. N counts parameters as the points do
(those active on a token), D counts tokens.
"""

import abc
import dataclasses
from collections.abc import Callable

import numpy as np

from archlab.analysis.scaling.points import Points
from archlab.layers.config import require

Terms = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # theta [..., P] -> values, jacobians


@dataclasses.dataclass(frozen=True)
class Law(abc.ABC):
    """What all laws share; `at` and `starts` are each law's own.

    name: a few words. formula: as the paper has it. names: the coefficients, in theta's order. terms: how many there
    are, the constant last; as many of the names are their factors. needs: further columns of the points, which vary.
    """

    name = formula = ""
    names = needs = ()
    terms = 3

    @abc.abstractmethod
    def at(self, points: Points) -> Terms:
        """The terms at these points, as a function of theta [..., P]: logarithms [..., K, n] and their jacobians,
        [..., K, n, P] or, where they do not depend on theta, [K, n, P]."""

    @abc.abstractmethod
    def starts(self) -> np.ndarray:
        """Where the search for the best theta begins, [S, P]."""

    def log_terms(self, theta: np.ndarray, points: Points) -> tuple[np.ndarray, np.ndarray]:
        return self.at(points)(theta)

    def sizes(self, points: Points) -> np.ndarray:
        """The parameters that the law speaks of, [n]."""
        return points.N

    def natural(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """Coefficients by name, of theta [..., P]: factors as such, no longer logarithms; 0 and inf where they are."""
        with np.errstate(over="ignore", under="ignore"):
            values = np.concatenate([np.exp(theta[..., :self.terms]), theta[..., self.terms:]], -1)
        return {name: values[..., i][()] for i, name in enumerate(self.names)}

    def predict(self, theta: np.ndarray, points: Points) -> np.ndarray:
        """The law's loss, [..., n]."""
        with np.errstate(over="ignore", under="ignore"):
            return np.exp(self.at(points)(theta)[0]).sum(-2)


@dataclasses.dataclass(frozen=True)
class Dense(Law):
    """L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv:2203.15556, approach 3).

    The 4,500 starts are those of Besiroglu et al. 2024 (arXiv:2404.10102).
    """

    name, formula = "dense", "E + A / N^alpha + B / D^beta"
    names = ("A", "B", "E", "alpha", "beta")

    def at(self, points):
        one, zero = np.ones(len(points)), np.zeros(len(points))
        return _linear([[one, zero, zero, -np.log(points.N), zero],
                        [zero, one, zero, zero, -np.log(points.D)],
                        [zero, zero, one, zero, zero]])

    def starts(self):
        factors, exponents = np.arange(0, 26, 5), np.arange(0, 2.1, 0.5)
        return _grid(factors, factors, np.arange(-1, 1.1, 0.5), exponents, exponents)


@dataclasses.dataclass(frozen=True)
class JointExperts(Law):
    """L = a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c, dense models and mixtures of experts
    in one (Ludziejewski et al. 2025, arXiv:2502.05172). alpha and beta are negative here, as in the paper.

    N: active parameters. Ê follows the number of experts E (1 for a dense model) from `start` at one expert to `limit`
    at infinitely many, after Clark et al. 2022 (arXiv:2202.01169):
    1 / Ê = 1 / (E - 1 + 1 / (1 / start - 1 / limit)) + 1 / limit. Both are settings, not fitted: few experiments have
    the range to tell them. As they are, Ê = E, and at one expert the law is the dense one.
    """

    start: float = 1.0
    limit: float = float("inf")

    name, formula = "joint experts", "a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c"
    names, needs = ("a", "b", "c", "alpha", "gamma", "delta", "beta", "zeta", "omega"), ("experts",)

    def __post_init__(self):
        require(self.start >= 1, self, "start", "at least 1, what one expert counts as")
        require(self.limit > self.start, self, "limit", "more than start; inf for no saturation")

    def effective(self, experts: np.ndarray) -> np.ndarray:
        """Ê."""
        return 1 / (1 / (experts - 1 + 1 / (1 / self.start - 1 / self.limit)) + 1 / self.limit)

    def at(self, points):
        one, zero = np.ones(len(points)), np.zeros(len(points))
        N, D, E = np.log(points.N), np.log(points.D), np.log(self.effective(points.more["experts"]))
        return _linear([[one, zero, zero, N, E * N, E, zero, zero, zero],
                        [zero, one, zero, zero, zero, zero, D, E * D, E],
                        [zero, zero, one] + [zero] * 6])

    def starts(self):
        factors, exponents, tilts = (0, 2.5, 5), (-0.6, -0.3, -0.1), (-0.5, 0, 0.5)
        return _grid(factors, factors, (-1, 0, 1), exponents, (0,), tilts, exponents, (0,), tilts)


@dataclasses.dataclass(frozen=True)
class FineGrained(Law):
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta (Krajewski et al. 2024, arXiv:2402.07871).

    G: granularity, how many times an expert's hidden size goes into the dense one's. At one number of experts to a
    parameter, as there.
    """

    name, formula = "fine-grained experts", "c + (g / G^gamma + a) / N^alpha + b / D^beta"
    names, needs, terms = ("g", "a", "b", "c", "gamma", "alpha", "beta"), ("granularity",), 4

    def at(self, points):
        one, zero = np.ones(len(points)), np.zeros(len(points))
        N, D, G = np.log(points.N), np.log(points.D), np.log(points.more["granularity"])
        return _linear([[one, zero, zero, zero, -G, -N, zero],
                        [zero, one, zero, zero, zero, -N, zero],
                        [zero, zero, one, zero, zero, zero, -D],
                        [zero, zero, zero, one, zero, zero, zero]])

    def starts(self):
        factors, exponents = (0, 2.5, 5), (0.1, 0.3, 0.6)
        return _grid((0, 2.5), factors, factors, (-1, 0, 1), (0.25, 0.5, 1), exponents, exponents)


@dataclasses.dataclass(frozen=True)
class Recursive(Law):
    """L = E + A / (N_once + r^phi N_recurring)^alpha + B / D^beta, of models that pass a part r times (Schwethelm et
    al. 2026, arXiv:2604.21106): at phi = 1 a further pass is worth as much as further parameters, at phi = 0 nothing.

    Columns: N_once and N_recurring, unique parameters outside and inside the recursion; recursions, r. Where r = 1 only
    their sum matters, so that a model without recursion has N_recurring = 0.
    """

    name, formula = "recursive", "E + A / (N_once + r^phi N_recurring)^alpha + B / D^beta"
    names, needs = ("A", "B", "E", "alpha", "beta", "phi"), ("recursions", "N_once", "N_recurring")

    def sizes(self, points):
        return points.more["N_once"] + points.more["N_recurring"]

    def at(self, points):
        one, zero, D = np.ones(len(points)), np.zeros(len(points)), np.log(points.D)
        with np.errstate(divide="ignore"):  # either part may be empty
            once, recurring, r = (np.log(points.more[name]) for name in ("N_once", "N_recurring", "recursions"))

        def terms(theta):
            A, B, E, alpha, beta, phi = (theta[..., i, None] for i in range(6))
            inside = recurring + phi * r
            N = np.logaddexp(once, inside)  # of the parameters that the recursion is worth
            shape = N.shape
            rows = [[one, zero, zero, -N, zero, -alpha * np.exp(inside - N) * r],
                    [zero, one, zero, zero, -D, zero],
                    [zero, zero, one, zero, zero, zero]]
            jacobians = np.stack([np.stack([np.broadcast_to(x, shape) for x in row], -1) for row in rows], -3)
            return np.stack([A - alpha * N, B - beta * D, np.broadcast_to(E, shape)], -2), jacobians

        return terms

    def starts(self):
        factors, exponents = np.arange(0, 21, 5), (0.25, 0.5, 1)
        return _grid(factors, factors, (-1, 0, 1), exponents, exponents, (0, 0.5, 1))


def _linear(rows: list[list[np.ndarray]]) -> Terms:
    """Terms whose logarithms are linear in theta: `rows` has a column [n] for each term and coefficient."""
    jacobians = np.array(rows).swapaxes(1, 2)  # [K, n, P]
    used = [[(p, column) for p, column in enumerate(row) if column.any()] for row in rows]
    value = lambda theta, row: sum(theta[..., p, None] * column for p, column in row)
    return lambda theta: (np.stack([value(theta, row) for row in used], -2), jacobians)


def _grid(*axes) -> np.ndarray:
    """All combinations, [S, P]."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes)).astype(np.float64)


DENSE, JOINT_EXPERTS, FINE_GRAINED, RECURSIVE = LAWS = (Dense(), JointExperts(), FineGrained(), Recursive())
