"""The objective of a fit, and Newton's method for many fits of one law at once.

The objective is the SUM over runs of Huber's loss of log L - log loss: quadratic up to DELTA and linear beyond, where
most runs of a real sweep lie. So curvature comes from the few inside and from the law itself, and Newton's step uses
both. It is measured in the metric of reweighted least squares, so that the coefficients' units and their correlation
(A with alpha) do not matter, and damped by it where the objective is no bowl: a short enough step always descends.
"""

import numpy as np

from archlab.analysis.scaling.laws import Law, Terms
from archlab.analysis.scaling.points import Points

DELTA = 1e-3  # of Hoffmann et al. 2022, section 3.3
ROUNDS = 300
BLOCK = 50_000  # fits at once, times their runs: more no longer fit a processor's cache


def objective(theta: np.ndarray, law: Law, points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Huber's loss of log L - log loss, summed over the runs, and its gradient.

    Of theta [..., P], they are [...] and [..., P].
    """
    return objective_of(law.at(points), np.log(points.loss))(np.asarray(theta, np.float64))


def objective_of(terms: Terms, target: np.ndarray):
    """`objective` of terms at points whose log losses are `target` [n]: theta -> value, gradient."""

    def value_and_gradient(theta):
        values, jacobians = terms(theta)
        total, shares = _logsumexp(values)
        error = total - target
        gradient = _weighed(shares * np.clip(error, -DELTA, DELTA)[..., None, :], jacobians)
        return huber(error).sum(-1), gradient

    return value_and_gradient


def huber(error: np.ndarray) -> np.ndarray:
    size = np.abs(error)
    return np.where(size <= DELTA, 0.5 * size * size, DELTA * (size - 0.5 * DELTA))


def log_loss(theta: np.ndarray, terms: Terms) -> np.ndarray:
    """log L, [..., n]."""
    return _logsumexp(terms(theta)[0])[0]


def minimise(terms: Terms, thetas: np.ndarray, target: np.ndarray, weights: np.ndarray | None = None) \
        -> tuple[np.ndarray, np.ndarray]:
    """The minima next to thetas [S, P] and their objectives [S], each to the last digits that a sum of floats has.

    target: log losses [n], or [S, n], each start's own. weights: how often each run counts, [S, n]. A start whose
    objective is not finite stays where it is.
    """
    thetas = np.array(thetas, np.float64)
    target = np.broadcast_to(target, (len(thetas), np.shape(target)[-1]))
    weights = np.ones_like(target) if weights is None else weights
    values = np.empty(len(thetas))
    count = max(1, BLOCK // target.shape[-1])
    for first in range(0, len(thetas), count):
        block = slice(first, first + count)
        thetas[block], values[block] = _minimise(terms, thetas[block], target[block], weights[block])
    return thetas, values


def _minimise(terms, thetas, target, weights):
    value = lambda theta, i: (weights[i] * huber(log_loss(theta, terms) - target[i])).sum(-1)
    with np.errstate(all="ignore"):  # what overflows is not finite, and no such step is taken
        values, damping = value(thetas, slice(None)), np.full(len(thetas), 1e-2)
        active = np.flatnonzero(np.isfinite(values))
        for _ in range(ROUNDS):
            if not active.size:
                break
            steps, gains = _steps(terms, thetas[active], target[active], weights[active], damping[active])
            trial = thetas[active] + steps
            reached = value(trial, active)
            before = values[active]
            better = reached < before
            thetas[active[better]], values[active[better]] = trial[better], reached[better]
            kept = (before - reached) / gains  # of what the step promised
            change = np.select([kept > 0.7, kept > 0.3, better], [0.15, 1, 2.5], 6)
            damping[active] = (damping[active] * change).clip(1e-9)
            ended = (gains <= 1e-15 * values[active]) | (damping[active] > 1e9)
            active = active[~ended]
    return thetas, values


def _steps(terms, theta, target, weights, damping):
    """A damped Newton step for each fit [S, P], and by how much it should lower the objective [S]."""
    values, jacobians = terms(theta)
    total, shares = _logsumexp(values)
    K, n, P = jacobians.shape[-3:]
    slopes = np.einsum("skn,knp->snp" if jacobians.ndim == 3 else "skn,sknp->snp", shares, jacobians)
    error = total - target
    psi = weights * np.clip(error, -DELTA, DELTA)
    gradient = np.einsum("sn,snp->sp", psi, slopes)
    reweighted = _products(slopes, weights * np.minimum(1, DELTA / np.abs(error).clip(1e-300)))
    curvature = _products(slopes, weights * (np.abs(error) <= DELTA) - psi) + \
        _products(jacobians.reshape(*jacobians.shape[:-3], K * n, P), (shares * psi[:, None]).reshape(-1, K * n))
    scale = np.sqrt(np.einsum("spp->sp", reweighted)).clip(1e-30)  # no less: of a term that is gone
    sizes, axes = np.linalg.eigh(reweighted / scale[:, :, None] / scale[:, None, :])
    whiten = axes / np.sqrt(sizes.clip(1e-13))[:, None, :] / scale[:, :, None]  # the metric becomes the unit matrix
    bends, turns = np.linalg.eigh(np.swapaxes(whiten, 1, 2) @ curvature @ whiten)
    whiten = whiten @ turns
    slope = np.einsum("spi,sp->si", whiten, gradient)
    step = -slope / (np.abs(bends) + damping[:, None])
    gains = -(slope * step).sum(-1) / 2
    step = np.einsum("spi,si->sp", whiten, step)
    return step / np.maximum(1, np.abs(step).max(-1, keepdims=True) / 5), gains


def _logsumexp(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log L [..., n], and the terms' shares of it [..., K, n]."""
    top = values.max(-2, keepdims=True)
    shares = np.exp(values - top)
    total = shares.sum(-2, keepdims=True)
    return (top + np.log(total))[..., 0, :], shares / total


def _weighed(coefficients: np.ndarray, jacobians: np.ndarray) -> np.ndarray:
    """sum_kn coefficients[..., k, n] jacobians[..., k, n, p]."""
    if jacobians.ndim == 3:
        return coefficients.reshape(*coefficients.shape[:-2], -1) @ jacobians.reshape(-1, jacobians.shape[-1])
    return np.einsum("...kn,...knp->...p", coefficients, jacobians)


def _products(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum_i weights[s, i] rows[..., i, p] rows[..., i, q], [S, P, P]."""
    return np.swapaxes(rows * weights[:, :, None], 1, 2) @ rows
