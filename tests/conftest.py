"""What all tests share."""

import ctypes
import gc
import os
import sys
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of a test's time is compilation, and programs this small gain nothing from being optimised.
QUICK = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):  # others may not know this flag, and end at one they do not know
    QUICK.append("--xla_cpu_use_fusion_emitters=false")  # 0.6 of the time of compilation
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))

import jax
import pytest


def pytest_addoption(parser):
    parser.addoption("--model", help="A Python file of yours with a CONFIG, to hold to the laws (tests/test_laws.py).")


@pytest.fixture
def float64():
    """Runs a test with 64-bit numbers, so that only a real difference shows."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def forget_programs():
    """Compiled programs are of little use to later tests. Each takes a few of the memory maps that Linux grants a
    process (65,530, all told): without one more, the next compilation crashes. What compiling has taken of the heap is
    given back only if asked for."""
    yield
    if _memory_maps() > 12_000:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


def _memory_maps() -> int:
    """How many memory maps this process has; 0 on systems that do not say."""
    try:
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return 0
