"""Training on a mesh of eight fake devices, in a process of its own: same losses, and on to another mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = """
import dataclasses, json, sys, jax
import archlab
from archlab.parallel.mesh import make_mesh
from archlab.training.loop import Run, train

run = Run(archlab.get_config("transformer-nano"), steps=10, batch=8, context=32, data="text:" + sys.argv[2],
          accumulate=2)
short = dataclasses.replace(run, steps=5)  # with a constant learning rate a shorter run is the beginning of a longer
run, short = (dataclasses.replace(r, optimizer=r.optimizer.set("schedule", "constant").set("warmup", 0.0))
              for r in (run, short))
go = lambda run, mesh, out=None: train(run, mesh=make_mesh(mesh) if mesh else None, out=out, log_every=1, quiet=True,
                                       tensorboard=False)
one = go(run, None)
go(short, "data:2,fsdp:2,tensor:2", sys.argv[1])
two = go(run, "fsdp:4,data:2", sys.argv[1])
table = two.state.params["embed/table"]
print(json.dumps({"one": [row["loss"] for row in one.history], "two": [row["loss"] for row in two.history],
                  "validation": [one.evaluation.loss, two.evaluation.loss],
                  "share": table.addressable_shards[0].data.size / table.size,
                  "loaded": float(abs(archlab.load(sys.argv[1]).embed.table[...] - jax.device_get(table)).max())}))
"""


def test_a_mesh_changes_nothing_and_a_checkpoint_goes_on_another(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"the {i}th line says {i * i} and no more\n" for i in range(1000)))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "run", text], cwd=Path(__file__).parents[2],
                          text=True, capture_output=True, env=os.environ | {"XLA_FLAGS": flags})
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(said["two"], said["one"], rtol=1e-4)
    np.testing.assert_allclose(*said["validation"], rtol=1e-4)
    assert said["share"] == 1 / 4  # the table's width lies over the four devices of fsdp
    assert said["loaded"] == 0
