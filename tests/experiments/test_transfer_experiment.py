"""The page of transfer against losses whose best rates are known, and a smoke run that goes on where it stopped."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from archlab.analysis.transfer_page import best, drifts, least, lost, write_page

ROOT = Path(__file__).parent.parent.parent
RATES = [2.0**power for power in range(-10, -3)]


def rows(drift, arm):
    """Losses with their minimum at 0.02 for size 32, and `drift` doublings further for each doubling; one diverged."""
    for size in (32, 64, 128):
        centre = 0.02 * (size / 32) ** drift
        for rate in RATES:
            loss = 3 + 0.1 * math.log2(rate / centre) ** 2 - math.log2(size) / 100
            yield {"model": "m", "axis": "width", "arm": arm, "size": size, "rate": rate,
                   "bits_per_byte": math.nan if size == 128 and rate == RATES[-1] else loss}


def test_best_rates_and_drifts():
    table = [*rows(-1.0, "standard"), *rows(0.0, "transfer")]
    found, key = best(table), ("m", "width")
    assert found[*key, "standard"][64][0] == pytest.approx(0.01)
    assert found[*key, "transfer"][128][0] == pytest.approx(0.02)
    assert drifts(table) == {(*key, "standard"): pytest.approx(-1), (*key, "transfer"): pytest.approx(0, abs=1e-9)}
    grid = min(RATES, key=lambda rate: abs(math.log(rate / 0.02)))
    own = min(RATES, key=lambda rate: abs(math.log(rate / 0.005)))
    difference = 0.1 * (math.log2(grid / 0.005) ** 2 - math.log2(own / 0.005) ** 2)
    assert lost(table)[*key, "standard"] == pytest.approx(difference) and lost(table)[*key, "transfer"] == 0
    edge = least(*map(np.array, ([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])))
    assert edge == (1.0, 1.0)


def test_the_page(tmp_path):
    checks = [{"model": "m", "arm": arm, "width": width, "step": step, "station": station, "size": 1.0,
               "change": step * (width if arm == "standard" else 1.0)}
              for arm in ("standard", "transfer") for width in (32, 64) for step in (0, 1, 2)
              for station in ("stream", "branches", "logits")]
    page = write_page(tmp_path, checks, [*rows(-1.0, "standard"), *rows(0.0, "transfer")], {"optimizer": "adamw"})
    text = page.read_text()
    assert "against width 32, 2 times (standard), 1 times (transfer)" in text and text.count("<svg") == 6
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "best_m_width.png", "sweep_m_width_standard.png", "sweep_m_width_transfer.png",
        "coordinates_m_stream.png", "coordinates_m_branches.png", "coordinates_m_logits.png"}


def run(out, *flags):
    return subprocess.run([sys.executable, "-m", "experiments.transfer", "--preset=smoke", f"--out={out}", *flags],
                          cwd=ROOT, text=True, capture_output=True, timeout=900,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_a_smoke_run_goes_on(tmp_path):
    first = run(tmp_path, "--parts=width", "--largest=16")
    assert first.returncode == 0, first.stdout + first.stderr
    with (tmp_path / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["arm"], row["size"]) for row in table] == [("standard", "16")] * 2 + [("transfer", "16")] * 2
    assert [row["bits_per_byte"] for row in table[:2]] == [row["bits_per_byte"] for row in table[2:]]
    assert all(5 < float(row["bits_per_byte"]) < 12 for row in table)
    again = run(tmp_path, "--parts=width", "--largest=16")
    assert again.returncode == 0 and "page:" in again.stdout
    assert first.stdout.count("...") == 1 and "..." not in again.stdout  # nothing is trained twice
    assert "--parts" in run(tmp_path, "--parts=widht").stderr
