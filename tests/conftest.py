"""What all tests share."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture
def float64():
    """Runs a test with 64-bit numbers, so that only a real difference shows."""
    with jax.enable_x64(True):
        yield
