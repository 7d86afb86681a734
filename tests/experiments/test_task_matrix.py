"""A tiny run of the tasks: every file is there, what is done is not done again, the matrix says what the runs say."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from archlab.analysis import task_page
from archlab.data.tasks import MQAR, Compression, Needle, Parity
from archlab.training.accuracy import scaled
from archlab.training.trials import Trials
from experiments.mixers import mixers, own_code, task_model

ROOT = Path(__file__).parent.parent.parent
FLAGS = ["--preset=smoke", "--models=attention,min-gru", "--tasks=parity-tiny,mqar-tiny", "--widths=16", "--steps=3",
         "--seeds=2"]
OF_ONE_RUN = pytest.mark.xdist_group("tasks")  # they share the fixture below


def tasks(out, *more):
    return subprocess.run([sys.executable, "-m", "experiments.tasks", f"--out={out}", *FLAGS, *more], cwd=ROOT,
                          text=True, capture_output=True, timeout=900, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    done = tasks(folder, "--workers=2")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@OF_ONE_RUN
def test_files_and_figures(out):
    rows = read(out / "results.csv")
    assert len(rows) == 2 * 2 * 2 and {row["steps"] for row in rows} == {"3"}
    assert {(row["model"], row["task"], row["seed"]) for row in rows} == {
        (model, task, seed) for model in ("attention", "min-gru") for task in ("parity-tiny", "mqar-tiny")
        for seed in "01"}
    parity = {row["model"]: row for row in rows if row["task"] == "parity-tiny" and row["seed"] == "0"}
    assert list(json.loads(parity["attention"]["tests"])) == ["40", "80", "160", "240"]
    # min-gru: 2 layers of 2 * 16 float32 and a segment; attention: keys and values of 40 places, and their numbers
    assert int(parity["min-gru"]["state_bytes"]) == 2 * (2 * 16 * 4 + 4) + 12
    assert int(parity["attention"]["state_bytes"]) > 2 * 2 * 40 * 16 * 4

    chance, *models = read(out / "matrix.csv")
    assert chance["mqar-tiny: 32 tokens, 8 pairs"] == str(1 / 32)[:6] and chance["parity-tiny: 240"] == "0.0"
    for line in models:
        mine = [json.loads(row["tests"])["240"] for row in rows
                if (row["model"], row["task"]) == (line["model"], "parity-tiny")]
        assert abs(float(line["parity-tiny: 240"]) - scaled(sum(mine) / 2, 0.5)) < 1e-4
    page = (out / "tasks.html").read_text()
    assert "http" not in page and "What theory says" in page and "chance" in page
    for name in ("matrix", "length_parity-tiny", "state_mqar-tiny"):
        assert (out / f"{name}.png").stat().st_size > 5000


@OF_ONE_RUN
def test_only_what_is_missing_is_run(out):
    lines = (out / "results.csv").read_text().splitlines(keepends=True)
    (out / "results.csv").write_text("".join(lines[:-2]) + lines[-1][:40] + "\n")  # a row lost, a row cut short
    again = tasks(out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stderr.count("validation") == 2 and again.stderr.count("/8] ") == 2
    whole = {(row["model"], row["task"], row["seed"]): row for row in read(out / "results.csv") if row["digest"]}
    assert len(whole) == 8
    for line in csv.DictReader(lines):  # and gives the same numbers as before
        assert whole[line["model"], line["task"], line["seed"]]["tests"] == line["tests"]


@pytest.mark.parametrize("flags, words", [
    (["--models=atention"], "did you mean attention"), (["--rates=fast"], "--rates = fast"),
    (["--models=nothing"], "one of your own is a Python file"), (["--models=own.py"], "there is no file own.py"),
    (["--models=a/gla.py"], "a/gla.py has the name of the known model gla"),
    (["--shard=2/2"], "--shard = 2/2"), (["--widths=15", "--models=retention"], "heads"),
])
def test_bad_input(tmp_path, flags, words):
    done = tasks(tmp_path, *flags)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_mixer_of_ones_own(tmp_path):
    """It is run beside the named; a changed file's runs are made anew, and those of named mixers are not."""
    own, flags = tmp_path / "mine.py", ["--tasks=mqar-tiny", "--seeds=1"]
    own.write_text("from archlab.recurrence.min_gru import MinGRU\ndef mixer(width): return MinGRU()\n")
    first = tasks(tmp_path / "out", f"--models={own},min-gru", *flags)
    assert first.returncode == 0, first.stderr
    mine, named = read(tmp_path / "out" / "results.csv")
    assert (mine["model"], named["model"]) == ("mine", "min-gru") and mine["tests"] == named["tests"]
    own.write_text("from archlab.recurrence.rwkv4 import RWKV4\nMIXER = RWKV4()\n")
    again = tasks(tmp_path / "out", f"--models={own},min-gru", *flags)
    assert again.returncode == 0 and again.stderr.count("validation") == 1, again.stderr
    digests = [row["digest"] for row in read(tmp_path / "out" / "results.csv")]
    assert len(set(digests)) == 3 and digests[1] == named["digest"]
    assert {row["model"] for row in read(tmp_path / "out" / "scores.csv")} == {"mine", "min-gru"}


@pytest.mark.parametrize("code, words", [
    ("MIXER = 3", "must define MIXER, a layer config, or mixer"),
    ("def mixer(width): return width", "must define MIXER"),
    ("from archlab.attention.attention import Attention\nMIXER = Attention(2, causal=False)", "not causal"),
])
def test_files_that_hold_no_mixer(tmp_path, code, words):
    own = tmp_path / "mine.py"
    own.write_text(code)
    with pytest.raises(ValueError, match=words):
        task_model(str(own), Parity(), 16, 1)


def test_a_comment_changes_the_code(tmp_path):
    code = "from archlab.recurrence.min_gru import MinGRU\nMIXER = MinGRU()\n"
    (tmp_path / "a.py").write_text(code)
    (tmp_path / "b.py").write_text(code + "# another thought\n")
    assert own_code(str(tmp_path / "a.py")) != own_code(str(tmp_path / "b.py")) and own_code("min-gru") == []


def test_rates_and_seeds_share_one_program():
    """A trial is a function of its rate and seed, and no trial compiles again."""
    task = Parity(length=6, every=True)
    trials = Trials(task_model("min-gru", task, 16, 1), task, steps=60, batch=16)
    first, other, faster, again = (trials.run(rate, seed, 16) for rate, seed in
                                   ((1e-3, 0), (1e-3, 1), (3e-2, 0), (1e-3, 0)))
    assert trials._step._cache_size() == 1 and trials._begin._cache_size() == 1
    losses = [run.validation.loss for run in (first, other, faster)]
    assert len(set(losses)) == 3 and again.validation == first.validation and losses[2] < losses[0]


def test_every_mixer_fits_and_the_bottleneck_is_one():
    import jax
    import jax.numpy as jnp
    from flax import nnx

    for width in (16, 32, 64, 128, 512):
        for name in mixers(width):
            model = task_model(name, Parity(), width, 2)
            model.body.check(width)
            if width == 16:
                nnx.eval_shape(lambda: model.build(nnx.Rngs(0)))
    task = Compression(length=6)
    model = task_model("min-gru", task, 16, 1).build(nnx.Rngs(0))
    ids = jax.random.randint(jax.random.key(0), (1, 11), 0, 17)
    before = model(ids).logits
    later = model(ids.at[:, 7].set(3)).logits  # what is written behind the mark is not seen
    assert jnp.allclose(before[:, 6], later[:, 6]) and jnp.allclose(before[:, 8:], later[:, 8:])
    assert not jnp.allclose(before[:, 6:], model(ids.at[:, 0].add(1)).logits[:, 6:])


def test_best_rate_is_by_validation_and_spread_over_seeds():
    row = lambda rate, seed, accuracy, test: {
        "model": "m", "task": "t", "width": 8, "seed": seed, "learning_rate": rate, "validation_accuracy": accuracy,
        "validation_loss": 1.0, "tests": {"32 tokens, 8 pairs": test}, "state_bytes": 10, "parameters": 5}
    rows = [row(1e-3, 0, 0.5, 0.9), row(1e-2, 0, 0.7, 0.6), row(1e-2, 1, 0.1, 0.8)]
    (line,) = task_page.summarise(rows, {"t": MQAR(symbols=64, length=32, pairs=8)})
    assert line["learning_rate"] == 1e-2 and line["score"] == pytest.approx(0.7) and line["seeds"] == 2
    assert line["spread"] == pytest.approx(0.02**0.5) and line["measure"] == "accuracy"
    assert len(task_page.columns_of({"n": Needle(length=64)})) == 2
