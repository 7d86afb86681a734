"""What adaptive depth is worth in quality: six studies of recursion, routing and halting; three seeds for each.

    python -m experiments.depth --preset=cpu --out=runs/depth

a  equal unique parameters: vanilla, Mixture-of-Recursions with 2 and 3 recursions. Expected: the more, the better.
b  the order of sharing weights. Expected: middle-cycle best.
c  expert choice or token choice, auxiliary loss or router, own keys or shared. Expected: the former of each.
d  equal training FLOPs. Expected: at this scale vanilla is better than Mixture-of-Recursions.
e  Mixture-of-Depths at 12.5%, at equal FLOPs. Expected: as good as dense; random routing much worse; predictors right
   about more than 97% of the tokens.
f  Universal Transformer with ACT: copying, reversing, adding beyond the trained length. Expected: longer than a
   Transformer can, with more steps for what is harder.

Each study's arithmetic and published numbers: experiments/depth_studies.py. All models of a study get the same learning
rates with seed 0, and the other seeds at the best. Models that two studies share are trained once. Of models whose
routing looks ahead in training there are three numbers: the loss under that routing, which leaks; the loss under causal
routing, the one that all comparisons are of; and the share of tokens on which the two agree.

Leaves under --out: runs.jsonl (a line per finished run; called again, only what is missing is run, and several calls
with other --studies may share the folder), models (the best of seed 0), results.csv, figures as PNG and depth.html (one
file, no network). Where a speed.json lies there, as `experiments.recursion --parts=speed` leaves it, the page has it as
a table, and draws loss against it.

Cost: --preset=quick 6 minutes on four CPU cores that also did other work, nearly all of it compilation; --preset=cpu
64 runs of 1.5e12 FLOPs on text and 48 of 0.8e12 on tasks, of about 40 seconds each on such a machine: an hour and more.
"""

import dataclasses
import hashlib
import json
import math
import sys
import time
from pathlib import Path

from absl import flags

from archlab.layers.config import near
from experiments import common

LETTERS = ("a", "b", "c", "d", "e", "f")

FLAGS = flags.FLAGS
flags.DEFINE_list("studies", list(LETTERS), f"Some of {', '.join(LETTERS)}.")
flags.DEFINE_enum("preset", "cpu", ["quick", "cpu"], "quick: does it run? cpu: what small models can tell.")
flags.DEFINE_integer("seeds", None, "Runs at the best rate. The preset's by default.")
flags.DEFINE_integer("steps", None, "Of training on text, (a)'s Mixture-of-Recursions. The preset's by default.")
flags.DEFINE_string("data", "stdlib", "The corpus of (a) to (e): stdlib, text:GLOB or tfds:NAME[/CONFIG], in bytes.")
flags.DEFINE_bool("train", True, "--notrain: only draw the runs that the folder has.")
flags.DEFINE_string("out", "runs/depth", "The folder of the results.")


class Runs:
    """runs.jsonl: a row per finished run, found again by what the run was."""

    def __init__(self, path: Path):
        self.path, self.done = path, {}
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                self._keep(json.loads(line))
            except json.JSONDecodeError:  # a line cut short is no row
                continue

    def add(self, row: dict) -> None:
        """Appends a row in one write, so that processes may share the file; on a line of its own, whatever is there."""
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(row))
        self._keep(row)

    def _keep(self, row: dict) -> None:
        self.done[row["digest"], row["learning_rate"], row["seed"]] = row


def best_rate(rows: list[dict]) -> float:
    """The rate of the row with the highest accuracy, or for text and of equals the lowest loss; none that diverged."""
    key = lambda row: (row["diverged"], -row.get("accuracy", 0.0), row["loss"])
    return min(rows, key=key)["learning_rate"]


def digest(arm, size) -> str:
    """What an arm is, rate and seed apart."""
    shape = [size.task_rows, arm.task.to_json()] if arm.task else [
        size.rows, size.context, size.eval_batches, FLAGS.data]
    text = json.dumps([arm.model.to_json(), arm.steps, *shape])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def chosen(arm, size, done: dict) -> list[dict]:
    """The finished runs of an arm at its best rate, by seed; none while rates are missing."""
    key = digest(arm, size)
    tried = [done[key, rate, 0] for rate in size.rates if (key, rate, 0) in done]
    if len(tried) < len(size.rates):
        return []
    rate = best_rate(tried)
    return [done[key, rate, seed] for seed in range(size.seeds) if (key, rate, seed) in done]


def train(arms: dict, size, runs: Runs) -> None:
    """Runs what is missing of these arms {digest: (name, arm)}: every rate with seed 0, then the other seeds at the
    best of them."""
    from archlab.analysis.accounts import count_parameters
    from archlab.data import load_corpus, tokenizer_from
    from experiments.depth_arms import TaskArm, TextArm
    from experiments.depth_studies import training_flops

    corpus, tokenizer = None, tokenizer_from("bytes", None)
    total, passed, trained, began = len(arms) * (len(size.rates) + size.seeds - 1), 0, 0, time.perf_counter()
    for key, (name, arm) in arms.items():
        compiled = None

        def row(rate: float, seed: int) -> dict:
            nonlocal compiled, corpus, passed, trained
            passed += 1
            if (key, rate, seed) in runs.done:
                return runs.done[key, rate, seed]
            if arm.task is None and corpus is None:
                corpus = load_corpus(FLAGS.data)
            if compiled is None:
                compiled = TaskArm(arm, size) if arm.task else TextArm(
                    arm, size, corpus, tokenizer, runs.path.parent / "models" / name, best=min(
                        (row["loss"] for (of, _, seed), row in runs.done.items() if of == key and not seed),
                        default=math.inf))
            place = f"[{passed}/{total}] {name}, rate {rate:g}, seed {seed}"
            shown = time.perf_counter()

            def show(step: int, loss: float) -> None:
                nonlocal shown
                if time.perf_counter() - shown > 20:
                    shown = time.perf_counter()
                    say(f"{place}: step {step}/{arm.steps} loss {loss:.3f}")

            tokens = arm.steps * (size.task_rows * arm.task.context if arm.task else size.rows * size.context)
            flops = training_flops(arm.model, arm.task.context if arm.task else size.context)
            made = {"digest": key, "name": name, "learning_rate": rate, "seed": seed, "steps": arm.steps,
                    "parameters": count_parameters(arm.model).total, "training_flops": flops * tokens,
                    **compiled.run(rate, seed, show)}
            made["loss"] = made["loss"] if math.isfinite(made["loss"]) else 1e9
            runs.add(made)
            trained += 1
            left = (time.perf_counter() - began) / trained * (total - passed)
            score = (" ".join(f"{label}: {value:.2f}" for label, value in made["tests"].items()) if arm.task else
                     f"{made['bits_per_byte']:.3f} bits/byte")
            say(f"{place}: {score}; {left / 60:.0f} min left")
            return made

        rate = best_rate([row(rate, 0) for rate in size.rates])
        for seed in range(1, size.seeds):
            row(rate, seed)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    import jax

    from archlab.analysis.depth_page import as_text, summarise, write_page
    from experiments.depth_studies import SIZES, STUDIES

    unknown = [letter for letter in FLAGS.studies if letter not in STUDIES]
    if unknown or not FLAGS.studies:
        raise ValueError(f"--studies has {unknown[0]!r}: {near(unknown[0], LETTERS)}" if unknown else
                         f"--studies is empty: give some of {', '.join(LETTERS)}")
    for flag in ("seeds", "steps"):
        if FLAGS[flag].value is not None and FLAGS[flag].value < 1:
            raise ValueError(f"--{flag} = {FLAGS[flag].value}: must be at least 1")
    size = SIZES[FLAGS.preset]
    size = dataclasses.replace(size, seeds=FLAGS.seeds or size.seeds, steps=FLAGS.steps or size.steps)
    studies = {letter: STUDIES[letter](size) for letter in FLAGS.studies}
    arms = {digest(arm, size): (name, arm) for study in studies.values() for name, arm in study.arms.items()}
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = Runs(out / "runs.jsonl")
    if FLAGS.train:
        train(arms, size, runs)
    found = {letter: {name: rows for name, arm in study.arms.items() if (rows := chosen(arm, size, runs.done))}
             for letter, study in studies.items()}
    table = summarise(found)
    if not table:
        raise ValueError(f"{out} has no finished run of these studies: call this without --notrain")
    told = {letter: (STUDIES[letter].__doc__, study.claims) for letter, study in studies.items()}
    speed = out / "speed.json"
    page = write_page(out, found, table, told, json.loads(speed.read_text()) if speed.is_file() else [], {
        "preset": FLAGS.preset, "corpus": FLAGS.data, "width": size.width, "rows": size.rows, "context": size.context,
        "seeds": size.seeds, "learning rates": ", ".join(f"{rate:g}" for rate in size.rates),
        "device": jax.devices()[0].device_kind})
    print(f"\n{as_text(table)}\n\nfigures: {out / 'results.csv'}\npictures: {page}")


if __name__ == "__main__":
    common.run(main)
