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


def table_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_smoke_run_goes_on(tmp_path):
    first = run(tmp_path, "--parts=width", "--largest=16")
    assert first.returncode == 0, first.stdout + first.stderr
    table = table_of(tmp_path / "sweep.csv")
    assert [(row["arm"], row["size"]) for row in table] == [("standard", "16")] * 2 + [("transfer", "16")] * 2
    assert [row["bits_per_byte"] for row in table[:2]] == [row["bits_per_byte"] for row in table[2:]]
    assert all(5 < float(row["bits_per_byte"]) < 12 for row in table)
    again = run(tmp_path, "--parts=width", "--largest=16")
    assert again.returncode == 0 and "page:" in again.stdout
    assert first.stdout.count("...") == 1 and "..." not in again.stdout  # nothing is trained twice
    assert "--parts" in run(tmp_path, "--parts=widht").stderr


def test_what_a_killed_run_left_undone_is_done_again_and_nothing_else(tmp_path):
    model, out = tmp_path / "mine.py", tmp_path / "out"
    model.write_text("from archlab.zoo import get_config\nCONFIG = get_config('transformer-nano')\n")
    flags = f"--models={model}", "--parts=coordinates,width"
    first = run(out, *flags)
    assert first.returncode == 0, first.stdout + first.stderr
    paths = [out / "coordinates.csv", out / "sweep.csv"]
    pictures = {path.name: path.read_bytes() for path in out.glob("*.png")}
    whole = [path.read_text().splitlines(keepends=True) for path in paths]
    assert [len(lines) for lines in whole] == [1 + 2 * 2 * 3, 1 + 2 * 2 * 2]

    # Killed while it wrote the last coordinate check, and the last sweep: of each a line is cut off in its middle.
    for path, lines in zip(paths, whole):
        path.write_text("".join(lines[:-1]) + lines[-1][:40])
    again = run(out, *flags)
    assert again.returncode == 0, again.stdout + again.stderr
    trained = [line.partition(" 32 ")[0] for line in again.stdout.splitlines() if "{" in line or "..." in line]
    assert trained == ["mine transfer width"] * 2
    for path, lines, new in zip(paths, whole, (3, 1)):  # a check anew from its first step on, a sweep's one rate
        found = path.read_text().splitlines(keepends=True)
        assert found[: len(lines)] == [*lines[:-1], lines[-1][:40] + "\n"] and len(found) == len(lines) + new
        assert [line.rsplit(",")[-1] for line in found[-new:]] == [line.rsplit(",")[-1] for line in lines[-new:]]
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == pictures and len(pictures) == 6

    model.write_text(model.read_text() + "# changed\n")
    changed = run(out, f"--models={model}", "--parts=width", "--largest=16")
    assert changed.stdout.count("mine standard width 16 ...") == 1, changed.stdout + changed.stderr
    versions = {row["version"] for row in table_of(paths[1]) if row["version"]}  # none on the cut line
    assert len(versions) == 2 and "32: " not in changed.stdout  # no size of the model as it was is shown
