"""What a run keeps of its experts: loads, collapses and the router that broke; whole also when it was cut off."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.data import load_corpus, tokenizer_from, train_batches
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.contract import Training
from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.weights import merge
from archlab.model import LanguageModel
from archlab.training import loop, objectives, programs
from archlab.training.expert_record import ExpertRecord
from archlab.training.loop import Interrupted, Run, train
from archlab.training.metrics import Lines, read_rows
from archlab.training.optimizers import Optimizer
from archlab.training.recorder import Diverged
from archlab.training.step import create_state, make_create, make_train_step, parameters

LAYERS = ["body/unit/0/layer", "body/unit/1/layer"]


def small(depth, router, **moe):
    return LanguageModel(256, 8, Repeat(Residual(MoE(4, 8, router, **moe)), depth))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"the {i}th line says {i * i} and no more\n" for i in range(900)))
    return Run(small(2, TopK(2, renormalise=True)), steps=9, batch=4, context=32, data=f"text:{path}")


@pytest.fixture(scope="module")
def collapsing(tmp_path_factory):
    """A text of one letter: all tokens are alike, so in each layer one expert gets them all."""
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("a" * 4000)
    still = Optimizer(learning_rate=1e-9)
    return Run(small(3, TopK(1), balance=()), steps=9, batch=2, context=16, data=f"text:{path}", optimizer=still)


def quietly(run, out, **more):
    return train(run, out=out, **{"log_every": 2, "tensorboard": False, "quiet": True, **more})


def interrupted(run, out, monkeypatch, step, **more):
    """Runs until the batch of `step` is asked for, then stops as SIGTERM does."""
    class Batches:
        def __init__(self, *args):
            self.batches, self.count = train_batches(*args), 0
            self.get_state, self.set_state = self.batches.get_state, self.batches.set_state

        def __next__(self):
            self.count += 1
            if self.count == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(self.batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_batches", Batches)
        with pytest.raises(Interrupted):
            quietly(run, out, **more)


def test_loads_are_kept_where_metrics_are(run, tmp_path):
    result = quietly(run, tmp_path, eval_every=3, tensorboard=True)
    rows, metrics = read_rows(tmp_path / "experts.jsonl"), read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in metrics] == [1, 2, 3, 4, 6, 8, 9]
    for row, of_step in zip(rows, metrics):
        assert list(row["load"]) == list(row["largest_logit"]) == LAYERS
        assert all(sum(load) == pytest.approx(1, abs=1e-5) and len(load) == 4 for load in row["load"].values())
        busiest = max(max(load) for load in row["load"].values())
        assert of_step["max_violation"] == pytest.approx(busiest * 4 - 1, abs=1e-4)
        assert of_step["largest_logit"] == max(row["largest_logit"].values())
    assert result.history == metrics and all(isinstance(x, (int, float)) for row in metrics for x in row.values())


def test_a_model_without_experts_leaves_no_such_file(run, tmp_path):
    dense = LanguageModel(256, 8, Residual(SwiGLU(8)))
    result = quietly(dataclasses.replace(run, model=dense, steps=2), tmp_path)
    assert not (tmp_path / "experts.jsonl").exists() and "max_violation" not in result.history[-1]


def test_the_record_of_a_run_cut_off_is_that_of_one_that_was_not(run, tmp_path, monkeypatch):
    quietly(run, tmp_path / "whole")
    cut = tmp_path / "cut"
    interrupted(run, cut, monkeypatch, 5)
    with (cut / "experts.jsonl").open("a") as file:  # killed after the checkpoint, in the middle of a line
        file.write(json.dumps({"step": 8, "load": {}}) + '\n{"step": 9, "lo')
    quietly(run, cut)
    assert (cut / "experts.jsonl").read_text() == (tmp_path / "whole" / "experts.jsonl").read_text()


def test_a_collapse_is_told_once_and_kept(collapsing, tmp_path, capsys):
    quietly(collapsing, tmp_path, collapse_after=4, quiet=False)
    rows = read_rows(tmp_path / "experts.jsonl")
    busy = {path: int(np.argmax(load)) for path, load in rows[0]["load"].items()}
    told = [row for row in rows if "collapse" in row]
    assert [(row["step"], row["collapse"]) for row in told] == [
        (4, {"layer": i + 1, "path": path, "experts": [e for e in range(4) if e != busy[path]], "since": 1, "steps": 4})
        for i, path in enumerate(f"body/unit/{copy}/layer" for copy in range(3))]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: step 4, layer")]
    assert len(warnings) == 3 and warnings[2].startswith("warning: step 4, layer 3 (body/unit/2/layer), experts ")


@pytest.mark.parametrize("saved, reached", [(3, 4), (5, 5), (5, 8), (6, 6), (7, 9), (8, 8)])
def test_a_collapse_is_told_once_though_the_run_was_cut(tmp_path, saved, reached):
    """Rows are written every second step; expert 1 starves from step 2 on, and is told in step 6."""
    def steps(first, last):
        record = ExpertRecord(Lines(tmp_path / "experts.jsonl", first - 1), told.append, 5)
        for step in range(first, last + 1):
            starving = np.array([0.98, 0.02]) if step > 1 else np.array([0.5, 0.5])
            record.add(step, {"body/unit/load": np.stack([starving, starving[::-1], np.array([0.5, 0.5])])})
            if step % 2 == 0:
                record.write(step)

    told = []
    steps(1, reached)
    steps(saved + 1, 12)
    rows = read_rows(tmp_path / "experts.jsonl")
    assert [row["step"] for row in rows if "load" in row] == [2, 4, 6, 8, 10, 12]
    assert [(row["step"], row["collapse"]["path"], row["collapse"]["experts"], row["collapse"]["since"])
            for row in rows if "collapse" in row] == [(6, "body/unit/0", [1], 2), (6, "body/unit/1", [0], 2)]
    assert told[:2] == ["warning: step 6, layer 1 (body/unit/0), expert 1: under 10% of the fair share of tokens for 5 "
                        "steps, since step 2",
                        "warning: step 6, layer 2 (body/unit/1), expert 0: under 10% of the fair share of tokens for 5 "
                        "steps, since step 2"]


def test_the_router_that_broke_is_named(run, monkeypatch):
    def broken(*args):
        structure, create, shardings = make_create(*args)
        path = "body/unit/layer/router/weight"

        @jax.jit
        def create_broken(seed):
            state = create(seed)
            params = state.params | {path: state.params[path].at[1, 0, 0].set(np.nan)}
            return dataclasses.replace(state, params=params)

        return structure, create_broken, shardings

    monkeypatch.setattr(programs, "make_create", broken)
    with pytest.raises(Diverged, match=rf"step 1: .* first router .* is that of layer 2 \({LAYERS[1]}\)"):
        train(run, quiet=True)


def test_a_router_is_only_named_where_its_logits_are_not_finite():
    record = ExpertRecord(None, print, 100)
    even = np.full((3, 4), 0.25)
    record.add(1, {"body/unit/load": even, "body/unit/largest_logit": np.array([3.0, 1e30, 2.0])})
    assert record.broken() == ""
    record.add(2, {"body/unit/load": even, "body/unit/largest_logit": np.array([3.0, np.inf, np.nan])})
    assert "layer 2 (body/unit/1)" in record.broken()
    record.add(3, {})
    assert record.broken() == ""


def test_loads_of_micro_batches_are_means(run):
    corpus = load_corpus(run.data)
    tokenizer = tokenizer_from("bytes", corpus)
    batch = next(train_batches(corpus, tokenizer, 32, 4, 0))
    transform = run.optimizer.build(parameters(run.model))
    structure, state, _ = create_state(run.model, transform, 0)
    model = merge(structure, state.params, state.rest)
    training = Training(jax.random.key(0), jnp.int32(0))
    said = jax.jit(lambda model, batch: objectives.run(model, batch, training).aux.traces)
    parts = [said(model, jax.tree.map(lambda a: a[i::2], batch)) for i in range(2)]
    _, metrics = make_train_step(structure, transform, tokenizer.bytes_per_token, accumulate=2)(state, batch)
    traces = metrics["traces"]
    assert {path.split("/")[-1] for path in traces} == {"load", "largest_logit", "dropped"}
    for path, value in traces.items():
        expected = sum(part[path] for part in parts) / 2
        np.testing.assert_allclose(value, expected, atol=1e-5)
