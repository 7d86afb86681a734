"""Expert parallelism: on meshes of eight devices the layer gives the numbers of one; and what needs no device."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from archlab.experts.dispatch import Experts
from archlab.experts.parallel import cheaper_form, round_room, run_experts
from archlab.parallel.mesh import AXES

ROOT = Path(__file__).parents[2]
FLAGS = ("--xla_force_host_platform_device_count=8 "
         "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")  # compiles twice as fast


def test_eight_devices_equal_one():
    """Outputs, losses, traces and gradients, dropless and with a capacity: the cases stand in on_eight_devices.py."""
    env = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-m", "tests.experts.on_eight_devices"], cwd=ROOT, env=env,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(run.stdout.splitlines()) == 20


@pytest.mark.parametrize("backend, platform", [("tpu", "tpu"), ("gpu", "cuda")])
def test_accelerators_send_ragged(backend, platform):
    """A training step lowered for eight of them: rows travel by ragged all-to-alls, only their labels by plain ones."""
    mesh = AbstractMesh((1, 1, 8, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)

    def loss(x, weights, up, down, choice):
        return run_experts(x, choice, weights, Experts(up, None, down, None, None, None, "silu"), None).sum()

    with jax.sharding.use_abstract_mesh(mesh), mock.patch("jax.default_backend", lambda: backend):
        step = jax.jit(jax.grad(loss, (0, 2))).trace(of(8, 32, 4), of(8, 32, 1), of(8, 4, 2), of(8, 2, 4),
                                                    of(8, 32, 1, dtype=jnp.int32))
    lines = step.lower(lowering_platforms=(platform,)).as_text().splitlines()
    assert sum("@ragged_all_to_all(" in line and "xf32>" in line for line in lines) >= 4  # there and back, two passes
    assert all("xi32>" in line for line in lines if "stablehlo.all_to_all" in line)


@pytest.mark.parametrize("tokens, k, devices, padded, ragged", [
    (1, 2, 8, "gather", "gather"),  # a decode step
    (16, 2, 8, "gather", "gather"),
    (4096, 2, 8, "all-to-all", "all-to-all"),
    (4096, 8, 64, "all-to-all", "all-to-all"),
    (4096, 2, 4, "gather", "all-to-all"),  # with room for twice an even share, rooms hold as many rows as all tokens
    (4096, 8, 8, "gather", "gather"),
])
def test_the_form_that_sends_less(tokens, k, devices, padded, ragged):
    slots = tokens * k
    assert cheaper_form(tokens, round_room(slots, devices)) == padded
    assert cheaper_form(tokens, slots // devices) == ragged
