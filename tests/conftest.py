"""What all tests share."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of a test's time is compilation, and programs this small gain nothing from being optimised.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest


def pytest_addoption(parser):
    parser.addoption("--model", help="A Python file of yours with a CONFIG, to hold to the laws (tests/test_laws.py).")


@pytest.fixture
def float64():
    """Runs a test with 64-bit numbers, so that only a real difference shows."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs of one file are of no use to the next, and gigabytes by the end."""
    yield
    jax.clear_caches()
