"""The scaling study as a user starts it: a plan first, then runs that are done once whatever happens, then a page."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--preset=smoke", "--models=transformer-nano", "--sizes=6e3,1.2e4,2.4e4", "--context=32",
         "--budgets=6e9,1.2e10", "--window=0.001,1000", "--eval_rows=32", "--repetitions=20",
         "--checkpoint_every=10"]
TIMED = {"seconds", "tokens_per_second"}
RUN = ["--run", "--rates=0.5,1"]


def command(out, *more):
    return [sys.executable, "-m", "experiments.scaling", f"--out={out}", *SMALL, *more]


def run(out, *more):
    return subprocess.run(command(out, *more), cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True,
                          capture_output=True, timeout=600)


def rows(out):
    """The rows of a table, without what no two runs have in common."""
    with (out / "results.csv").open() as file:
        return [{key: cell for key, cell in row.items() if key not in TIMED} for row in csv.DictReader(file)]


def key(row):
    return row["architecture"], float(row["size"]), float(row["budget"]), row["learning_rate"], row["role"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that nothing disturbed, of two learning rates a size."""
    out = tmp_path_factory.mktemp("scaling") / "whole"
    done = run(out, *RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_plan_trains_nothing(tmp_path):
    done = run(tmp_path / "out", "--noestimate", "--workers=2")
    assert done.returncode == 0, done.stderr
    assert "6 runs and 0 more to try learning rates" in done.stdout and "in 2 parts" in done.stdout
    assert "nothing was trained: --run starts it" in done.stdout and not (tmp_path / "out").exists()
    timed = run(tmp_path / "out", "--sizes=6e3")
    assert "hours on this machine" in timed.stdout, timed.stdout + timed.stderr


def test_rows_and_page(whole):
    found = rows(whole)
    kept = [row for row in found if row["role"] == "run"]
    assert len(kept) == 6 and len(found) == 6 + 6  # two trials a size, of which the better is a run as well
    for row in kept:
        flops = 6 * float(row["N:counted"]) * float(row["tokens"])
        assert flops == pytest.approx(float(row["budget"]), rel=0.05)
        trials = [other for other in found if other["role"] == "trial" and key(other)[:2] == key(row)[:2]]
        best = min(trials, key=lambda trial: float(trial["loss"]))
        assert row["learning_rate"] == best["learning_rate"]
    for name in ("scaling.html", "fits.csv", "multipliers.csv", "loss_for_compute.png"):
        assert (whole / name).stat().st_size > 0


def test_more_compute_is_less_loss(whole):
    by = {key(row)[:3]: float(row["loss"]) for row in rows(whole) if row["role"] == "run"}
    for (name, size, budget), loss in by.items():
        if budget < 1.2e10:
            assert by[name, size, 1.2e10] < loss


def test_killed_and_started_again(whole, tmp_path):
    """Killed without warning, then with, then started again: only what was missing is trained, and the table is that
    of the study that nothing disturbed."""
    out, before = tmp_path / "out", []
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(command(out, *RUN), cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
                                   stderr=subprocess.DEVNULL)
        begun = time.monotonic()
        while not (out / "results.csv").is_file() or len(rows(out)) < len(before) + 2:
            assert time.monotonic() - begun < 300 and process.poll() in (None, 0)
            time.sleep(0.05)
        process.send_signal(number)
        process.wait()
        before = rows(out)
    with (out / "results.csv").open("a") as file:
        file.write("transformer-nano,6000.0,3")  # what a process that died while writing leaves
    done = run(out, *RUN)
    assert done.returncode == 0, done.stderr
    found = [row for row in rows(out) if row["digest"]]
    assert sorted(rows(whole), key=key) == sorted(found, key=key)
    trained = [line for line in done.stderr.splitlines() if line.startswith("[0/1]")]
    ever = 6 + 6 - 3  # runs and trials, of which one of each size is a run as well
    assert len(trained) == ever - len({row["digest"] for row in before})


def test_shards_share_a_table(whole, tmp_path):
    """Each shard does its own part, and together they leave what one process would."""
    out = tmp_path / "out"
    for shard in ("0/2", "1/2"):
        done = run(out, *RUN, f"--shard={shard}")
        assert done.returncode == 0 and not (out / "scaling.html").exists(), done.stderr
    assert sorted(rows(whole), key=key) == sorted(rows(out), key=key)
    page = run(out, f"--csv={out / 'results.csv'}")
    assert page.returncode == 0 and (out / "scaling.html").exists(), page.stderr


def test_transfer_tries_rates_at_the_smallest_size_only(tmp_path):
    done = run(tmp_path, *RUN, "--transfer=completep", "--workers=3")
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path)
    assert {float(row["size"]) for row in found if row["role"] == "trial"} == {6e3}
    assert len({row["learning_rate"] for row in found if row["role"] == "run"}) == 1


def test_tables_of_others(tmp_path):
    """Columns C, N, D and loss; the law behind them is found."""
    lines = ["C,N,D,loss"]
    for N in (1e6, 3e6, 1e7, 3e7):
        for C in (1e15, 1e16, 1e17):
            D = C / (6 * N)
            lines.append(f"{C},{N},{D},{1.7 + 400 / N**0.34 + 410 / D**0.28}")
    (tmp_path / "other.csv").write_text("\n".join(lines))
    done = run(tmp_path / "out", f"--csv={tmp_path / 'other.csv'}")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "fits.csv").open() as file:
        found = {row["coefficient"]: float(row["value"]) for row in csv.DictReader(file)}
    assert found["alpha"] == pytest.approx(0.34, abs=1e-6) and found["beta"] == pytest.approx(0.28, abs=1e-6)


@pytest.mark.parametrize("flags, words", [
    (["--sizes=1e4,x"], "--sizes = 1e4,x: must be numbers above 0"),
    (["--window=1"], "--window = 1: must be two numbers above 0"), (["--window=9,1"], "must be below the second"),
    (["--reference=mamba"], "--reference = mamba: "),
    (["--budgets=-1"], "--budgets = -1"), (["--shard=2/2"], "--shard = 2/2"), (["--seeds=0"], "--seeds = 0"),
    (["--eval_rows=3"], "--eval_rows = 3: must be a multiple of"),
    (["--sizes=1.00e4,1.01e4"], "give the same model"),
    (["--budgets=1e3"], "nothing is left to run"),
    (["--models=bert-nano"], "cannot stand beside that of the next token"),
    (["--models=transfomer-nano"], "did you mean transformer-nano"),
    (["--csv=nowhere.csv"], "nowhere.csv"),
])
def test_bad_input(tmp_path, flags, words):
    done = run(tmp_path, "--noestimate", *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr


def test_a_model_file_that_changed_is_another_model(tmp_path):
    """Its runs are not taken for those of the file as it was."""
    own = tmp_path / "own.py"
    own.write_text("from archlab.zoo import get_config\nCONFIG = get_config('transformer-nano')\n")
    flags = ["--run", f"--models={own}", "--sizes=6e3", "--budgets=6e9"]
    assert "no architecture has runs that a law can be fitted to" in run(tmp_path / "out", *flags).stderr
    assert len(rows(tmp_path / "out")) == 1
    own.write_text(own.read_text() + "# changed\n")
    done = run(tmp_path / "out", *flags)
    assert done.returncode == 2 and "own.py has changed since the run in" in done.stderr


def test_rates_that_diverge_cost_only_their_own_size(tmp_path):
    done = run(tmp_path / "out", "--run", "--rates=1e9,2e9", "--sizes=6e3,1.2e4")
    found = rows(tmp_path / "out")
    assert {row["size"] for row in found} == {"6000.0", "12000.0"} and all(row["diverged"] == "true" for row in found)
    assert done.returncode == 2 and "diverged" in done.stderr  # there is nothing to fit
