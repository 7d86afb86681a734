"""One law for several architectures, as a user asks for it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
E, A, B, ALPHA, BETA, PHI = 1.8, 480.0, 2000.0, 0.35, 0.37, 0.46


def table(path):
    """The runs of a model without recursion, and of two that pass 70% of their parameters 2 and 4 times."""
    rng, lines = np.random.default_rng(0), ["architecture,N,D,loss,recursions,N_once,N_recurring,experts"]
    for r in (1, 2, 4):
        for unique in (1e6, 4e6, 1.6e7, 6.4e7):
            for D in (2e7, 2e8, 2e9):
                once, again = (unique, 0) if r == 1 else (0.3 * unique, 0.7 * unique)
                loss = (E + A / (once + r**PHI * again) ** ALPHA + B / D**BETA) * np.exp(0.002 * rng.normal())
                lines.append(f"loops-{r},{once + r * again},{D},{loss},{r},{once},{again},1")
    path.write_text("\n".join(lines))
    return path


def run(out, *more):
    command = [sys.executable, "-m", "experiments.scaling", f"--csv={table(out.parent / 't.csv')}", f"--out={out}",
               "--repetitions=60", *more]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True, capture_output=True,
                          timeout=300)


def test_phi_is_found_within_its_interval(tmp_path):
    done = run(tmp_path / "out", "--law=recursive")
    assert done.returncode == 0 and "pooled.csv" in done.stdout, done.stderr
    with (tmp_path / "out" / "pooled.csv").open() as file:
        phi = next(row for row in csv.DictReader(file) if row["coefficient"] == "phi")
    assert float(phi["low"]) < PHI < float(phi["high"]) < float(phi["low"]) + 0.25
    assert "One law for all" in (tmp_path / "out" / "scaling.html").read_text()


def test_a_law_that_cannot_be_told_is_refused_and_all_else_is_on_the_page(tmp_path):
    done = run(tmp_path / "out", "--law=joint-experts")
    assert done.returncode == 2 and "--law = joint-experts: loops-1, loops-2, loops-4: the joint experts" in done.stderr
    assert "on experts = 1 alone: must vary" in done.stderr
    page = (tmp_path / "out" / "scaling.html").read_text()
    assert "There is no such law" in page and "How much compute for equal loss" in page


def test_an_unknown_law_is_told_at_once(tmp_path):
    done = run(tmp_path / "out", "--law=recursion")
    assert done.returncode == 2 and "did you mean recursive" in done.stderr and not (tmp_path / "out").exists()
