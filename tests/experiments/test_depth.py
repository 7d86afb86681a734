"""The studies of adaptive depth, tiny: a run leaves all its files, what is done is not done again, and the page says
what the runs say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from archlab.analysis import depth_page
from archlab.analysis.depths import total_depth
from experiments.depth_arms import TaskArm
from experiments.depth_studies import SIZES, STUDIES, equal_steps, training_flops

ROOT = Path(__file__).parent.parent.parent
OF_ONE_RUN = pytest.mark.xdist_group("depth")  # they share the fixture below
QUICK = SIZES["quick"]


def depth(out, *more):
    return subprocess.run([sys.executable, "-m", "experiments.depth", "--preset=quick", f"--out={out}", *more],
                          cwd=ROOT, text=True, capture_output=True, timeout=900,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"})


def rows_of(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines() if line]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    (folder / "speed.json").write_text(json.dumps([
        {"model": name, "batch": 1, "decode_tokens_per_second": speed, "cache_bytes": 7654} for name, speed in
        (("vanilla, 4 blocks", 300.0), ("MoR, 3 recursions", 200.0), ("a stranger", 1.0))]))
    done = depth(folder, "--studies=a")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@OF_ONE_RUN
def test_rows_have_three_numbers(out):
    rows = rows_of(out)
    assert len(rows) == 3 * 2 and {row["seed"] for row in rows} == {0, 1}
    for row in rows:
        assert 5 < row["bits_per_byte"] < 12 and row["tokens"] == 4 * 2 * 32 and not row["diverged"]
        assert row["loss"] / np.log(2) == pytest.approx(row["bits_per_byte"])  # a token is a byte
        if row["name"].startswith("vanilla"):
            assert row["blocks"] == 4 and row["depth_counts"] is None and "agreement" not in row
            continue
        counts, n = row["depth_counts"], int(row["name"].split()[1])
        mean = np.dot(counts, range(len(counts))) / sum(counts)
        assert sum(counts) == 2 * 2 * 32 and counts[0] == 0 and row["blocks"] == pytest.approx(2 + 2 * mean)
        assert 0 < row["agreement"] <= 1 and len(row["routers"]) == n
        assert row["look_ahead_bits"] != row["bits_per_byte"]
        if row["seed"] == 0:
            assert np.max(row["example"]["depth"]) <= n and np.shape(row["example"]["ids"]) == (2, 32)


@OF_ONE_RUN
def test_page_says_what_runs_say(out):
    page, rows = (out / "depth.html").read_text(), rows_of(out)
    assert "http" not in page.replace("http-equiv", "")
    for words in ("(a) Equal unique parameters", "look-ahead (leaky)", "routings agree", "What this does not show",
                  "7,654", "MoR, 3 recursions: depth", "Quality for speed, batch 1", "prefers-color-scheme: dark"):
        assert words in page, words
    for name in {row["name"] for row in rows}:
        mean = np.mean([row["bits_per_byte"] for row in rows if row["name"] == name])
        assert f">{mean:.4f}<" in page
    for file in ("a_loss", "a_depths", "loss_by_depth", "pareto_1"):
        assert (out / f"{file}.png").stat().st_size > 5000
    assert re.search(r"MoR, 3 recursions&#x27; is .* than &#x27;MoR, 2|not told apart", page)
    head, *lines = (out / "results.csv").read_text().splitlines()
    assert len(lines) == 3 and "look_ahead_bits" in head


@OF_ONE_RUN
def test_what_is_done_is_not_done_again(out):
    before = (out / "runs.jsonl").read_text()
    lines = [line for line in before.splitlines() if line]
    (out / "runs.jsonl").write_text("\n" + "\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # cut off while being written
    again = depth(out, "--studies=a")
    assert again.returncode == 0 and again.stderr.count("min left") == 1, again.stderr
    after = (out / "runs.jsonl").read_text().splitlines()
    assert after[1:-2] == lines[:-1]
    timeless = lambda line: {key: value for key, value in json.loads(line).items() if key != "seconds"}
    assert timeless(after[-1]) == timeless(lines[-1])  # and it is the same run
    drawn = depth(out, "--studies=a", "--notrain")
    assert drawn.returncode == 0 and "min left" not in drawn.stderr
    assert (out / "runs.jsonl").read_text().splitlines() == after


@pytest.mark.parametrize("flags, words", [
    (["--studies=g"], "--studies has 'g'"), (["--seeds=0"], "--seeds = 0: must be at least 1"),
    (["--studies=b", "--notrain"], "has no finished run of these studies"),
])
def test_bad_input(tmp_path, flags, words):
    done = depth(tmp_path, *flags)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_studies_are_what_they_say():
    """Claims are about arms of the study; equal FLOPs are equal to half a step, equal parameters to the routers'."""
    from archlab.analysis.accounts import count_parameters

    studies = {letter: make(QUICK) for letter, make in STUDIES.items()}
    for study in studies.values():
        assert study.claims and all(name in study.arms for claim in study.claims for name in claim)
    unique = [count_parameters(arm.model).total for arm in studies["a"].arms.values()]
    assert max(unique) - min(unique) <= 3 * QUICK.width
    (_, mor), *others = sorted(studies["d"].arms.items())
    spent = QUICK.steps * training_flops(mor.model, QUICK.context)
    for arm in [arm for letter in "de" for arm in studies[letter].arms.values()]:
        cost = training_flops(arm.model, QUICK.context)
        assert abs(arm.steps * cost - spent) <= cost / 2 and arm.steps == equal_steps(QUICK, arm.model)


def test_total_depth_is_over_all_layers():
    """Copies that are stacked, and several layers, are summed; what is not over every token is passed over."""
    deep, steps = np.arange(12).reshape(2, 2, 3), np.arange(6).reshape(2, 3)
    traces = {"a/unit/depth": jnp.array(deep), "b/halting/steps": jnp.array(steps), "c/depth": jnp.ones((2, 2)),
              "d/gate": jnp.ones((2, 3))}
    np.testing.assert_array_equal(total_depth(traces, (2, 3)), deep[0] + deep[1] + steps)
    assert total_depth({"d/gate": jnp.ones((2, 3))}, (2, 3)) is None


def test_halting_on_a_task():
    """A Universal Transformer's steps are told for tokens read and tokens answered, at every length."""
    arm = TaskArm(STUDIES["f"](QUICK).arms["copy: UT, ACT"], QUICK)
    row = arm.run(3e-3, 0, None)
    assert list(row["tests"]) == list(row["steps_taken"]) == ["3", "6", "12"]
    assert all(1 <= value <= 6 for steps in row["steps_taken"].values() for value in steps.values())
    shown = row["example"]
    assert np.shape(shown["ids"]) == np.shape(shown["depth"]) == (4, 6)
    found = {"f": {"copy: UT, ACT": [row | {"digest": "x", "learning_rate": 1e-3, "seed": 0, "steps": 4,
                                            "parameters": 1, "training_flops": 1.0}]}}
    (line,) = depth_page.summarise(found)
    assert line["accuracy_at_four_times"] == row["tests"]["12"] and line["spread_at_trained"] is None
    assert line["steps_answering_at_trained"] == row["steps_taken"]["3"]["answering"]
    assert {"f_copy", "f_copy_steps"} <= set(depth_page.figures(found, [line], []))


def test_verdicts_are_paired_by_seed():
    row = lambda seed, bits: {"seed": seed, "bits_per_byte": bits}
    rows = {"x": [row(0, 2.0), row(1, 3.0), row(2, 4.0)], "y": [row(0, 2.1), row(1, 3.11), row(2, 4.09)],
            "one": [row(0, 9.0)]}
    (said,) = depth_page.verdicts(rows, [("x", "y"), ("x", "one"), ("x", "missing")])
    assert said.startswith("'x' is better than 'y' (+0.1000 bits/byte")
    (said,) = depth_page.verdicts(rows, [("y", "x")])
    assert "is WORSE than" in said
    task = lambda seed, right: {"seed": seed, "tests": {"3": 1.0, "12": right}}
    (said,) = depth_page.verdicts({"x": [task(0, 0.5), task(1, 0.6)], "y": [task(0, 0.4), task(1, 0.7)]}, [("x", "y")])
    assert "is not told apart from" in said and "of the answers at 12" in said
