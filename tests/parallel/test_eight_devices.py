"""Runs `*_on_eight_devices.py` in processes that pretend to have eight devices, one for each model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import representatives

HERE = Path(__file__).parent
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def run(file: str, selection: str = "") -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "-n", "0", str(HERE / file), "-k", selection], text=True,
                          env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}, cwd=HERE.parents[1],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", representatives())
def test_training_equals_one_device(name):
    run("training_on_eight_devices.py", f"[{name}-")


def test_shardings():
    run("shardings_on_eight_devices.py")
