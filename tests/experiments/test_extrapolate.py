"""A smoke run: its figures hold together, and what is trained is not trained again."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import archlab
from archlab.data import load_corpus, tokenizer_from, validation_batches
from archlab.layers.weights import split
from archlab.training.evaluation import evaluate, make_evaluate_step

ROOT = Path(__file__).parent.parent.parent
METHODS = ["learned", "rope", "dynamic", "yarn"]


def extrapolate(out, *flags):
    return subprocess.run([sys.executable, "-m", "experiments.extrapolate", "--preset=smoke", f"--out={out}", *flags],
                          cwd=ROOT, text=True, capture_output=True, timeout=900,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_a_smoke_run(tmp_path):
    first = extrapolate(tmp_path, "--methods=rope,learned")
    assert first.returncode == 0, first.stdout + first.stderr
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/checkpoints/*")}
    assert len({path.parent.parent.name for path in trained}) == 2
    done = extrapolate(tmp_path, f"--methods={','.join(METHODS)}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/checkpoints/*")} == trained

    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    bits = {(row["method"], int(row["context"]), row["places"]): float(row["bits_per_byte"]) for row in rows}
    assert list(dict.fromkeys(row["method"] for row in rows)) == METHODS
    assert {row["weights"] for row in rows if row["method"] in ("rope", "dynamic", "yarn")} == {"rope"}
    for method in METHODS:
        assert bits[method, 16, "all"] == pytest.approx(bits[method, 16, "0-15"])
        places = [bits[method, 64, places] for places in ("0-15", "16-31", "32-63")]
        assert 5 < min(places) < bits[method, 64, "all"] < max(places) < 12
        assert f"{bits[method, 64, 'all']:.3f}" in done.stdout and f"{places[2]:.3f}" in done.stdout
    assert bits["dynamic", 16, "all"] == pytest.approx(bits["rope", 16, "all"], abs=1e-5)  # the same up to there
    assert bits["dynamic", 32, "all"] != bits["rope", 32, "all"] and bits["yarn", 16, "all"] != bits["rope", 16, "all"]
    for figure in ("trained_by_length", "trained_by_place", "rope_by_length", "rope_by_place"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 5000

    corpus, tokenizer = load_corpus("stdlib"), tokenizer_from("bytes", None)
    structure, *weights = split(archlab.load(tmp_path / "runs" / "rope"))
    found = evaluate(make_evaluate_step(structure, tokenizer.bytes_per_token), *weights,
                     validation_batches(corpus, tokenizer, 64, 2, 4))
    assert found.targets.sum() > 400 and math.isclose(found.bits_per_byte, bits["rope", 64, "all"], rel_tol=1e-5)


@pytest.mark.parametrize("flags, words", [
    (["--methods=rope,alibbi"], "did you mean alibi?"),
    (["--methods="], "--methods is empty"),
    (["--data=stdlb"], "stdlib"),
])
def test_bad_input(tmp_path, flags, words):
    done = extrapolate(tmp_path, *flags)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
