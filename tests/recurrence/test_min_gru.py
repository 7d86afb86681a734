"""minGRU against a slow float64 loop written from the paper, and its errors."""

import numpy as np
import pytest

from archlab.recurrence.min_gru import MinGRU
from tests.recurrence.against import check, sigmoid


def reference(w, x):
    """Token by token (arXiv:2410.01201, section 3.1)."""
    h, y = 0, []
    for token in x:
        z = sigmoid(token @ w["gate"])
        h = (1 - z) * h + z * (token @ w["candidate"])
        y.append(h @ w["out"])
    return np.stack(y)


def test_min_gru_is_the_papers(float64):
    check(MinGRU(expand=3), reference)


def test_no_channels():
    with pytest.raises(ValueError, match="MinGRU.expand = 0: must be at least 1"):
        MinGRU(expand=0)
