"""A smoke comparison: every file is there, its figures hold together, and what is done is not done again."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import archlab
from archlab.analysis import comparison

ROOT = Path(__file__).parent.parent.parent
MODELS = ["transformer-nano", "mamba-nano", "mixture-of-experts-nano", "universal-transformer-nano",
          "mixture-of-recursions-nano"]
FLAGS = ["--batch=2", "--context=32", "--eval_batches=1", "--flops=2.5e8", "--seeds=2", "--lr_trials=1"]


def compare(out, *more):
    return subprocess.run([sys.executable, "-m", "experiments.compare", f"--out={out}", *FLAGS, *more], cwd=ROOT,
                          text=True, capture_output=True, timeout=900, env=os.environ | {"JAX_PLATFORMS": "cpu"})


OF_ONE_RUN = pytest.mark.xdist_group("compare")  # they share the fixture below


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    done = compare(folder, f"--models={','.join(MODELS)}")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@OF_ONE_RUN
def test_results(out):
    rows = {row["model"]: row for row in read(out / "results.csv")}
    assert list(rows) == MODELS
    for name, row in rows.items():
        profile = archlab.profile(name, context=32)
        assert int(row["parameters_total"]) == profile.parameters.total
        assert math.isclose(float(row["flops_per_token"]), profile.training.total, rel_tol=1e-9)
        assert math.isclose(float(row["training_flops"]), float(row["flops_per_token"]) * int(row["tokens"]))
        step = float(row["flops_per_token"]) * 64
        assert abs(float(row["training_flops"]) - 2.5e8) <= step / 2  # equal FLOPs, to the nearest step
        assert 2 < float(row["validation_bits_per_byte"]) < 12 and float(row["spread"]) > 0
        for key in ("train_tokens_per_second", "compile_seconds", "first_token_seconds", "decode_tokens_per_second"):
            assert float(row[key]) > 0
        ahead = name == "mixture-of-recursions-nano"  # the only one whose training form looks at later tokens
        assert bool(row["look_ahead_bits"]) == bool(row["routing_agreement"]) == ahead
        assert not ahead or 0 < float(row["routing_agreement"]) <= 1 and row["look_ahead_bits"] != row[
            "validation_bits_per_byte"]
    assert rows["mamba-nano"]["state_bytes_1k"] == rows["mamba-nano"]["state_bytes_32k"]
    assert int(rows["transformer-nano"]["state_bytes_32k"]) > 7 * int(rows["transformer-nano"]["state_bytes_4k"])


@OF_ONE_RUN
def test_page_and_pictures(out):
    page = (out / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and "What this does not show" in page
    for name in ("loss_by_flops", "loss_by_tokens", "loss_by_seconds", "loss_by_decode_speed", "state_by_context",
                 "expert_load_mixture-of-experts-nano"):
        assert (out / f"{name}.png").stat().st_size > 5000
    for label in ("with look-ahead (leaky)", "routings agree", "recursions", "steps before halting", "mean step size"):
        assert label in page
    said = (out / "stdout").read_text()
    assert "next: python -m experiments.generate --checkpoint=" in said and "bits/byte" in said


@OF_ONE_RUN
def test_finished_runs_are_skipped(out):
    done = sorted((out / "runs").glob("*/result.json"))
    before = {path: path.stat().st_mtime_ns for path in done}
    gone = done[0]
    gone.unlink()
    again = compare(out, f"--models={','.join(MODELS)}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path for path in before if path.stat().st_mtime_ns != before[path]} == {gone}
    changed = compare(out, f"--models={','.join(MODELS)}", "--flops=4e8")
    assert changed.returncode == 2 and "other settings" in changed.stderr


@pytest.mark.parametrize("flags, words", [
    (["--models=transfomer-nano"], "did you mean transformer-nano"),
    (["--models=transformer-nano", "--flops=1"], "buys 0 steps; every model needs at least 2, for which --flops="),
    (["--models=transformer-nano", "--match=params", "--tokens=65"],
     "buys 1 step; every model needs at least 2, for which --tokens=128"),
    (["--models=a/x.py,b/x.py"], "--models has a/x.py and b/x.py, both named x"),
    (["--models=a/mamba-nano.py"], "a/mamba-nano.py has the name of the known model mamba-nano"),
    (["--models=transformer-nano,mamba-nano", "--set=body.unit.layers.0.layer.heads=2"],
     "--set body.unit.layers.0.layer.heads=2 of mamba-nano: Residual has no field 'layers'"),
    (["--models=transformer-nano,bert-nano"], "bert-nano is trained on the masked tokens"),
    (["--models=transformer-nano", "--data=stdlb"], "stdlib"),
    (["--models=transformer-nano", "--seeds=0"], "--seeds = 0"),
    (["--models=transformer-nano", "--modells=x"], "models"),
])
def test_bad_input(tmp_path, flags, words):
    done = compare(tmp_path, *flags)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_equal_parameters_and_equal_trials(tmp_path):
    done = compare(tmp_path, "--models=transformer-nano,mamba-nano", "--match=params", "--tokens=300", "--seeds=2",
                   "--lr_trials=2")
    assert done.returncode == 0, done.stdout + done.stderr
    runs, rows = read(tmp_path / "runs.csv"), read(tmp_path / "results.csv")
    assert len(runs) == 6  # for each model two rates with seed 0, and one more seed at the better
    for row in rows:
        mine = [run for run in runs if run["model"] == row["model"]]
        assert len({run["learning_rate"] for run in mine}) == 2 and {run["seed"] for run in mine} == {"0", "1"}
        tried = {run["learning_rate"]: float(run["validation_bits_per_byte"]) for run in mine if run["seed"] == "0"}
        assert row["learning_rate"] == min(tried, key=tried.get)
    sizes = [int(row["parameters_active"]) - int(row["parameters_embedding"]) for row in rows]
    assert abs(sizes[0] / sizes[1] - 1) <= 0.03 and rows[0]["tokens"] == rows[1]["tokens"]


def test_a_task(tmp_path):
    """Models get the task's symbols, the accuracy is told, and so is that one trained far longer than the other."""
    own = tmp_path / "little.py"
    own.write_text("from archlab.zoo.min_gru import min_gru\nCONFIG = min_gru(width=2, depth=1)\n")
    flags = [f"--models=transformer-nano,{own}", "--data=task:mqar-tiny", "--seeds=1", "--flops=5e7"]
    done = compare(tmp_path / "out", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["model"]: row for row in read(tmp_path / "out" / "results.csv")}
    assert int(rows["transformer-nano"]["parameters_total"]) == archlab.profile(
        archlab.get_config("transformer-nano", vocab=64), context=32).parameters.total
    table = done.stdout.split("\n\n")[-2].splitlines()
    assert table[0].split()[:4] == ["model", "accuracy", "bits/answer", "spread"]
    for line in table[1:]:
        name, accuracy, bits = line.split()[:3]
        assert accuracy == f"{float(rows[name]['validation_accuracy']):.3f}"
        assert bits == f"{float(rows[name]['validation_bits_per_answer']):.3f}"
    steps = {name: int(row["tokens"]) // 64 for name, row in rows.items()}
    assert steps["little"] > 10 * steps["transformer-nano"]
    assert f"warning: little gets {steps['little']} steps" in done.stderr
    assert "next:" not in done.stdout


def test_verdict_says_what_may_be_said():
    row = lambda name, loss, spread, seeds: {"model": name, "validation_bits_per_byte": loss, "spread": spread,
                                             "seeds": seeds}
    assert "no telling" in comparison.verdict([row("a", 2.0, None, 1), row("b", 2.1, None, 1)])
    assert "not distinguishable" in comparison.verdict([row("a", 2.0, 0.1, 3), row("b", 2.1, 0.1, 3)])
    assert "standard errors over 3" in comparison.verdict([row("a", 2.0, 0.01, 3), row("b", 2.1, 0.01, 3)])
    assert "alone" in comparison.verdict([row("a", 2.0, None, 1)])


def test_files_of_ones_own(tmp_path):
    """A changed file is not taken for the run it once was, and its mistakes are told with their line."""
    own = tmp_path / "own_toy.py"
    code = ("from archlab.zoo.transformer import transformer\n"
            "CONFIG = transformer(width=16, depth=1, heads=2, hidden=16)\n")
    own.write_text(code)
    flags = [f"--models={own}", "--match=params", "--tokens=300", "--seeds=1"]
    done = compare(tmp_path / "out", *flags)
    assert done.returncode == 0 and f"--code={own}" in done.stdout, done.stdout + done.stderr
    own.write_text(code + "# another thought\n")
    assert "has changed since" in compare(tmp_path / "out", *flags).stderr
    own.write_text(code + "CONFIG.nothing()\n")
    wrong = compare(tmp_path / "other", *flags)
    assert wrong.returncode == 2 and f"{own}, line 3" in wrong.stderr and "Traceback" not in wrong.stderr
