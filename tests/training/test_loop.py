"""The loop: interrupted, killed, gone wrong, and gone on from there with the same numbers."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import archlab
from archlab.data import train_batches
from archlab.training import loop
from archlab.training.loop import Interrupted, Run, train
from archlab.training.metrics import Journal, read_rows
from archlab.training.progress import Progress, line
from archlab.training.recorder import Diverged, Recorder

ROOT = Path(__file__).parents[2]
TEXT = " ".join(f"the {i}th line says {i * i} and no more\n" for i in range(2000))
LOSSES = ("step", "loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run over a file."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return Run(archlab.get_config("transformer-nano"), steps=12, batch=4, context=32, data=f"text:{path}")


@pytest.fixture(scope="module")
def whole(run):
    """What the run gives when nothing disturbs it."""
    return train(run, log_every=1, eval_every=6, quiet=True)


class Disturbed:
    """The batches, with something done before the one of a step."""

    def __init__(self, *args, step, act):
        self.batches, self.step, self.act, self.count = train_batches(*args), step, act, 0
        self.get_state, self.set_state = self.batches.get_state, self.batches.set_state

    def __next__(self):
        self.count += 1
        batch = next(self.batches)
        return self.act(batch) if self.count == self.step else batch


def disturb(monkeypatch, step, act):
    monkeypatch.setattr(loop, "train_batches", lambda *args: Disturbed(*args, step=step, act=act))


def losses(rows):
    return [{key: row[key] for key in LOSSES} for row in rows]


def test_history(run, whole):
    assert [row["step"] for row in whole.history] == list(range(1, 13))
    assert whole.history[-1]["loss"] < whole.history[0]["loss"]
    assert whole.history[-1]["tokens"] == 12 * 4 * 32
    evaluated = [row["step"] for row in whole.history if "validation_loss" in row]
    assert evaluated == [6, 12]
    assert whole.evaluation.loss == whole.history[-1]["validation_loss"]
    assert whole.compile_seconds > 0 and whole.tokens_per_second > 0
    assert whole.model(np.zeros((1, 4), np.int32)).logits.shape == (1, 4, 256)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_call_goes_on(run, whole, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        disturb(patch, 7, lambda batch: os.kill(os.getpid(), number) or batch)
        before = signal.getsignal(number)
        with pytest.raises(Interrupted) as error:
            train(run, out=tmp_path, log_every=1, eval_every=6, tensorboard=False, quiet=True)
        assert error.value.code == 75
        assert signal.getsignal(number) is before
    stopped = error.value.step
    assert stopped in (7, 8)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, stopped + 1))
    result = train(run, out=tmp_path, log_every=1, eval_every=6, tensorboard=False, quiet=True)
    assert losses(result.history) == losses(whole.history)
    assert losses(read_rows(tmp_path / "metrics.jsonl")) == losses(whole.history)
    assert result.evaluation.loss == whole.evaluation.loss


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path, monkeypatch):
    disturb(monkeypatch, 8, lambda batch: dataclasses.replace(batch, weights=batch.weights * np.nan))
    with pytest.raises(Diverged, match="step 8") as error:
        train(run, out=tmp_path, checkpoint_every=2, log_every=1, tensorboard=False, quiet=True)
    assert error.value.step == 8
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["4", "6"]
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["step"] == 7


def test_a_loss_beyond_any_guess_stops_the_run():
    recorder = Recorder(steps=100, tokens_per_step=1, vocab=256, rate=lambda step: 0.1, log_every=1, seconds=0.0,
                        progress=Progress("", 100, quiet=True), journal=None, peak_tokens_per_second=None)
    for step in range(1, 12):
        recorder.add(step, {"loss": 3.0, "bits_per_byte": 4.0, "grad_norm": 1.0})
    recorder.add(12, {"loss": 60.0, "bits_per_byte": 4.0, "grad_norm": 1.0})  # one spike is forgiven
    with pytest.raises(Diverged, match="twice"):
        for step in range(13, 40):
            recorder.add(step, {"loss": 20.0, "bits_per_byte": 4.0, "grad_norm": 1.0})


def test_a_corpus_shorter_than_a_context(run):
    with pytest.raises(ValueError, match="fewer than one row"):
        train(dataclasses.replace(run, context=10**6), quiet=True)


def test_a_tokenizer_larger_than_the_vocabulary(run):
    with pytest.raises(ValueError, match="vocab=300"):
        train(dataclasses.replace(run, tokenizer="bpe:300"), quiet=True)


@pytest.mark.parametrize("field, value", [("steps", 0), ("context", 0), ("accumulate", 3), ("seed", -1)])
def test_bad_settings_are_named(run, field, value):
    with pytest.raises(ValueError, match=f"Run.{field} = {value}"):
        dataclasses.replace(run, **{field: value})


def test_the_journal_drops_what_will_be_run_again(tmp_path):
    journal = Journal(tmp_path, tensorboard=False)
    for step in range(1, 6):
        journal.write({"step": step, "loss": 1.0})
    journal.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the process was killed here
    journal = Journal(tmp_path, step=3, tensorboard=False)
    journal.write({"step": 4, "loss": 2.0})
    journal.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["step"] for text in lines] == [1, 2, 3, 4]
    assert json.loads(lines[-1])["loss"] == 2.0


def test_progress_line():
    row = {"step": 80, "loss": 2.3112, "bits_per_byte": 3.3344, "tokens_per_second": 9120.0, "mfu": 0.31}
    expected = "x   40%  step 80/200  loss 2.311  3.334 bits/byte  9,120 tok/s  MFU 31%  1m05s left"
    assert line("x", 200, row, 65) == expected


def command(run, out, *more):
    return [sys.executable, "-m", "experiments.train", "--model=transformer-nano", f"--steps={run.steps}", "--batch=4",
            "--context=32", f"--data={run.data}", f"--out={out}", "--log_every=1", "--eval_every=0",
            "--checkpoint_every=10", *more]


def test_kill_in_mid_run_then_the_same_command(run, tmp_path):
    """kill -9 loses nothing but the steps since the last checkpoint, and they are run again to the same bits."""
    run = dataclasses.replace(run, steps=150)
    out = tmp_path / "run"
    process = subprocess.Popen(command(run, out), cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(read_rows(out / "metrics.jsonl")) < 12 or not (out / "checkpoints" / "10").exists():
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.002)
    process.kill()
    process.wait()
    reached = read_rows(out / "metrics.jsonl")[-1]["step"]
    assert 12 <= reached < 150
    run_again = subprocess.run(command(run, out), cwd=ROOT, capture_output=True, text=True, check=True)
    assert "going on after step" in run_again.stderr
    assert f"experiments.generate --checkpoint={out}" in run_again.stdout
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 151))
    assert losses(rows) == losses(train(run, log_every=1, quiet=True).history)
    evaluated = subprocess.run([sys.executable, "-m", "experiments.evaluate", f"--checkpoint={out}", "--batch=4",
                                "--batches=20"], cwd=ROOT, text=True, capture_output=True, check=True)
    report = json.loads(evaluated.stdout.splitlines()[-1])
    assert report["bits_per_byte"] == pytest.approx(rows[-1]["validation_bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize("flag, words", [
    ("--modle=x", "did you mean model"), ("--model=transfomer-nano", "transformer-nano"),
    ("--data=stdlb", "did you mean stdlib"), ("--set=body.m=3", "no field 'm'")])
def test_bad_input_is_told_without_a_traceback(flag, words):
    done = subprocess.run([sys.executable, "-m", "experiments.train", "--out=never", flag], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not (ROOT / "never").exists()
