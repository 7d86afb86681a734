"""Longer runs that branch off from shorter ones where the learning rate of these begins to fall, and runs that share
what is compiled."""

import dataclasses

import chex
import pytest

import archlab
from archlab.analysis.collectives import memory
from archlab.data import load_corpus, tokenizer_from
from archlab.training.checkpoints import Checkpoints
from archlab.training.loop import Run, train
from archlab.training.optimizers import Optimizer
from archlab.training.programs import Programs

QUIET = dict(quiet=True, tensorboard=False, eval_batches=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return f"text:{file}"


def wsd(steps: int, warmup: int = 2, rate: float = 1e-3) -> Optimizer:
    return Optimizer(learning_rate=rate, schedule="wsd", warmup=warmup / steps, decay=0.25)


def run_of(text, steps, optimizer=None, **changes):
    config = archlab.get_config("transformer-nano")
    return dataclasses.replace(Run(config, steps, 2, 32, text, optimizer=optimizer or wsd(steps)), **changes)


def test_a_branch_is_the_run_alone(text, tmp_path):
    """Bit for bit: parameters, moments and the loss, over three lengths of one trunk; and only the rest is trained."""
    runs = [run_of(text, steps) for steps in (8, 12, 16)]
    alone = [train(run, out=tmp_path / f"alone{run.steps}", **QUIET) for run in runs]
    before = None
    for run, expected in zip(runs, alone):
        found = train(run, out=tmp_path / f"{run.steps}", branch_from=before, **QUIET)
        chex.assert_trees_all_equal(found.state, expected.state)
        assert found.evaluation.bits_per_byte == expected.evaluation.bits_per_byte
        before = tmp_path / f"{run.steps}"
    assert [row["step"] for row in found.history] == [10, 16]  # from step 9, the 12 steps' last at the full rate, on


def test_a_branch_point_outlives_interruptions(text, tmp_path):
    run = run_of(text, 8)
    train(run, out=tmp_path / "run", checkpoint_every=1, keep=1, **QUIET)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert sorted(checkpoints.manager.all_steps()) == [6, 8] and run.branches_at == 6
    checkpoints.close()


@pytest.mark.parametrize("longer, why", [
    (dict(optimizer=wsd(16, warmup=4)), "same learning rates up to none"),
    (dict(optimizer=wsd(16, rate=2e-3)), "same learning rates up to none"),
    (dict(optimizer=Optimizer(schedule="cosine")), "same learning rates up to none"),
    (dict(seed=1), "seed: 0 in the checkpoint, 1 now"),
    (dict(optimizer=dataclasses.replace(wsd(16), weight_decay=0.0)), "optimizer.weight_decay: 0.1 in the checkpoint"),
])
def test_other_runs_are_no_trunk(text, tmp_path_factory, longer, why):
    short = tmp_path_factory.getbasetemp() / "short"
    if not short.exists():
        train(run_of(text, 8), out=short, **QUIET)
    with pytest.raises(ValueError, match=why):
        train(run_of(text, 16, **longer), out=short.with_name("longer"), branch_from=short, **QUIET)


def test_runs_share_programs(text):
    """Other rates, schedules, lengths and seeds, compiled once, give what each gives alone."""
    corpus = load_corpus(text)
    tokenizer = tokenizer_from("bytes", corpus)
    runs = [run_of(text, 4), run_of(text, 6, Optimizer(learning_rate=3e-3)), run_of(text, 4, seed=2)]
    programs = Programs(runs[0], tokenizer.bytes_per_token)
    for run in runs:
        shared = train(run, corpus, tokenizer, programs=programs, **QUIET)
        chex.assert_trees_all_equal(shared.state, train(run, corpus, tokenizer, **QUIET).state)
        assert shared.compile_seconds == 0
    weights = sum(value.nbytes for value in shared.state.params.values())
    assert memory(programs.compiled) > 3 * weights  # and two moments
    for other in (dict(batch=4), dict(context=16), dict(optimizer=Optimizer(b2=0.99)), dict(accumulate=2)):
        with pytest.raises(ValueError, match="compiled for another model"):
            train(run_of(text, 4, **other), corpus, tokenizer, programs=programs, **QUIET)
