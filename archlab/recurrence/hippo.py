"""HiPPO-LegS: the matrix whose state holds the past in Legendre polynomials, taken apart (all in NumPy, float64).

Gu et al. 2020, HiPPO (arXiv:2008.07669); as a normal matrix less one of rank one: S4 (arXiv:2111.00396), appendix C.
"""

import functools

import numpy as np


def legs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A [N, N] and B [N] of `x' = A x + B u`."""
    n = np.arange(size)
    root = np.sqrt(2 * n + 1)
    return -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0), root


@functools.cache
def diagonal_plus_low_rank(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """LegS in the basis V that makes it `Lambda - P P*`.

    Returns: Lambda, P, B [N/2] and V [N, N/2], of the modes that turn forward (Im Lambda > 0): the other half are
      their conjugates. Lambda alone is HiPPO-N, from which S4D-LegS and S5 start.
    """
    A, B = legs(size)
    P = np.sqrt(np.arange(size) + 0.5)
    normal = A + np.outer(P, P)  # -1/2 on the diagonal, and skew-symmetric beside it
    turns, V = np.linalg.eigh(-1j * normal)
    forward = turns > 0
    turns, V = turns[forward], V[:, forward]
    return -0.5 + 1j * turns, V.conj().T @ P, V.conj().T @ B, V
