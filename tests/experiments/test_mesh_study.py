"""The experiment over meshes, on eight devices that a CPU pretends to have."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FLAGS = ["--devices=8", "--batch=8", "--context=16", "--steps=1", "--model=mixture-of-experts-nano", "--set=body.n=1"]


def sharding(*more):
    return subprocess.run([sys.executable, "-m", "experiments.sharding", *FLAGS, *more], cwd=ROOT, text=True,
                          capture_output=True, timeout=600, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_meshes_side_by_side(tmp_path):
    done = sharding(f"--out={tmp_path}", "--meshes=data:8 data:2,expert:4")
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "sharding.csv").open() as file:
        data, expert = csv.DictReader(file)
    number = lambda row, key: float(row[key])
    assert number(data, "all-reduce") > 0 and number(data, "all-to-all") == number(data, "reduce-scatter") == 0
    assert number(expert, "all-to-all") + number(expert, "reduce-scatter") > 0  # tokens travel
    assert number(expert, "all-reduce_MB") < number(data, "all-reduce_MB")  # the experts' gradients do not
    for row in (data, expert):
        kinds = [key for key in row if key.endswith("_MB") and key.removesuffix("_MB") in row]
        assert abs(sum(number(row, key) for key in kinds) - number(row, "sent_MB")) < 1e-9 and len(kinds) == 6
        assert number(row, "memory_MB") > 0.1 and number(row, "step_ms") > 0
    assert "| data:2,expert:4 |" in (tmp_path / "sharding.md").read_text()


def test_bad_meshes_end_at_once():
    for flag, words in [("--meshes=data:3", "8"), ("--meshes=expart:8", "did you mean expert"),
                        ("--set=body.unit.layers.1.layer.experts=6", "6 experts do not divide over expert:8")]:
        done = sharding("--meshes=expert:8", flag)
        assert done.returncode == 2 and words in done.stderr, done.stderr
