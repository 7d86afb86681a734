"""Trains every sequence mixer on synthetic tasks that decide between families, and draws the matrix.

    python -m experiments.tasks --preset=cpu --workers=4 --out=runs/tasks

Leaves under --out: results.csv (a row per finished run; called again, only what is missing is run), scores.csv (every
test, mean and spread over seeds), matrix.csv, matrix.png, other figures and tasks.html (one file, no network).

All models of a task are the same network but for the mixer, and get the same learning rates with the same seeds; the
best rate is that with the highest validation accuracy, and the scores are those of all seeds at it. A task's name gives
it as published (docs/tasks.md); NAME-tiny is small enough for a CPU.

Expected, of --preset=cpu (scaled accuracy for parity, 0 is guessing; accuracy for the others):
  parity-tiny at 2 to 6 times its length: near 1 for mamba-negative, delta-net-negative, gated-delta-net-negative,
    rwkv7 and slstm; near 0 for attention, mamba and every recurrence whose decays lie in [0, 1]. (mamba3 rotates: it
    can, too.)
  selective-copying-tiny: near 1 for attention and mamba; low for what no token chooses (s4d, retention, lightning).
  induction-heads-tiny, from 256 tokens to 16384: mamba stays high; attention-absolute is at chance from twice on.
  mqar-tiny: attention near 1 at every width; recurrences rise with the bytes of their state; hyena lowest.
Cost: --preset=smoke 1 to 2 minutes. --preset=cpu: docs/tasks.md.
"""

import hashlib
import sys
import time
from pathlib import Path

from absl import flags

from archlab.layers.config import Config
from experiments import common, workers
from experiments.rows import Rows


class Setting(Config):
    """How a task is trained. widths: the network's; the matrix shows the largest. mlp: behind each mixer."""

    steps: int = 500
    batch: int = 32
    widths: tuple[int, ...] = (64,)
    depth: int = 2
    mlp: bool = True


SETTINGS = {
    "parity": Setting(steps=20_000, batch=256),
    "mqar": Setting(steps=12_500, batch=512, widths=(64, 128, 256, 512), mlp=False),
    "mqar-128": Setting(steps=12_500, batch=512, widths=(64, 128, 256, 512), mlp=False),
    "mqar-256": Setting(steps=25_000, batch=256, widths=(64, 128, 256, 512), mlp=False),
    "mqar-512": Setting(steps=50_000, batch=128, widths=(64, 128, 256, 512), mlp=False),
    "mqar-tiny": Setting(steps=1200, batch=64, widths=(16, 64), mlp=False),
    "induction-heads": Setting(steps=100_000, batch=8),
    "selective-copying": Setting(steps=400_000, batch=64),
    **{f"mad-{name}": Setting(steps=20_000, batch=128, widths=(128,)) for name in (
        "in-context-recall", "noisy-recall", "fuzzy-recall", "selective-copying", "compression")},
    "mad-memorisation": Setting(steps=400, batch=128, widths=(128,)),
    "parity-tiny": Setting(steps=1000),
    "selective-copying-tiny": Setting(steps=800),
    "induction-heads-tiny": Setting(steps=800, batch=8),
}
DECIDING = ["attention", "attention-absolute", "mamba", "slstm", "delta-net-negative", "mamba-negative", "s4", "rwkv7",
            "rwkv7-negative", "hyena", "mamba2", "gated-delta-net-negative", "gla", "mlstm"]
QUESTIONS = ["parity-tiny", "selective-copying-tiny", "induction-heads-tiny", "mqar-tiny"]
PRESETS = {
    "smoke": dict(models=["attention", "mamba"], tasks=["parity-tiny", "mqar-tiny"], rates=["3e-3"], seeds=1, steps=20,
                  widths=["32"]),
    "cpu": dict(models=DECIDING, tasks=QUESTIONS, rates=["3e-3", "1e-2"], seeds=3, steps=None, widths=None),
}
ROWS, TOKENS = 512, 2**17  # rows of validation, and of a test unless that has more tokens than this; never below 16

FLAGS = flags.FLAGS
flags.DEFINE_enum("preset", "cpu", list(PRESETS), "smoke: does it run? cpu: what tells families apart.")
flags.DEFINE_list("models", None, "Mixers (experiments/mixers.py), or Python files of yours with a MIXER or\n"
                  "mixer(width). The preset's by default; `all` for every one that has a name.")
flags.DEFINE_list("tasks", None, "Names of tasks (docs/tasks.md). The preset's by default.")
flags.DEFINE_list("rates", None, "Learning rates that every model tries. The preset's by default.")
flags.DEFINE_integer("seeds", None, "Runs at the best rate. The preset's by default.")
flags.DEFINE_integer("steps", None, "Steps a run; by default each task's own.")
flags.DEFINE_list("widths", None, "Widths of the network; by default each task's own.")
workers.define_workers()
flags.DEFINE_bool("train", True, "--notrain: only draw the runs that the folder has.")
flags.DEFINE_string("out", "runs/tasks", "The folder of the results.")


class Cell(Config):
    """A model on a task at a width: what is compiled once."""

    mixer: str
    task: str
    width: int
    setting: Setting


FIELDS = ("model", "task", "width", "seed", "learning_rate", "steps", "batch", "parameters", "state_bytes",
          "validation_accuracy", "validation_loss", "validation_exact", "diverged", "seconds", "tests", "digest")


def main() -> None:
    from archlab.data.tasks import get_task

    preset = PRESETS[FLAGS.preset]
    given = lambda name: preset[name] if getattr(FLAGS, name) is None else getattr(FLAGS, name)
    tasks = {name: get_task(name) for name in given("tasks")}
    rates, seeds = _rates(given("rates")), given("seeds")
    cells = _cells(given("models"), tasks, given("steps"), given("widths"))
    shard, shards = workers.shard_of(FLAGS.shard)
    for name, value in (("seeds", seeds), ("workers", FLAGS.workers)):
        if value < 1:
            raise ValueError(f"--{name} = {value}: must be at least 1")
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    results = Rows(out / "results.csv", FIELDS)
    if not FLAGS.train:
        shards = 1
    elif FLAGS.workers > 1:
        workers.share("experiments.tasks", shard, shards, FLAGS.workers, [1.0] * FLAGS.workers)
    else:
        _train(cells[shard::shards], tasks, rates, seeds, results)
    if shards == 1:
        _draw(cells, tasks, rates, seeds, results, out)


def _cells(models: list[str], tasks: dict, steps: int | None, widths: list[str] | None) -> list[Cell]:
    from experiments.mixers import mixers, task_model

    names = list(mixers(64)) if models == ["all"] else list(common.named(models, mixers(64)).values())
    cells = []
    for task in tasks:  # all models of a task before the next task
        setting = SETTINGS.get(task, Setting())
        for width in map(int, widths) if widths else setting.widths:
            for name in names:
                task_model(name, tasks[task], width, setting.depth).body.check(width)  # all valid, or none begins
                cells.append(Cell(name, task, width, setting.set("steps", steps) if steps else setting))
    return cells


def _rates(texts: list[str]) -> list[float]:
    try:
        rates = [float(text) for text in texts]
    except ValueError:
        raise ValueError(f"--rates = {','.join(texts)}: must be numbers, as 1e-3,3e-3") from None
    if not rates or min(rates) <= 0:
        raise ValueError(f"--rates = {','.join(texts)}: must be positive")
    return rates


def _finished(results: Rows) -> dict[tuple, dict]:
    """{(digest, seed): row}: rows are found again by what the run was."""
    return {(row["digest"], row["seed"]): row for row in results.read()}


def _train(cells: list[Cell], tasks: dict, rates: list[float], seeds: int, results: Rows) -> None:
    """Runs what is missing of these cells: every rate with seed 0, then the other seeds at the best of them."""
    from archlab.analysis.task_page import best_rate
    from archlab.training.trials import Trials
    from experiments.mixers import task_model

    done, began, trained = _finished(results), time.perf_counter(), 0
    total = len(cells) * (len(rates) + seeds - 1)
    passed = 0
    for cell in cells:
        task, trials = tasks[cell.task], None

        def row(rate: float, seed: int) -> dict:
            nonlocal trials, trained, passed
            passed += 1
            key = (_digest(cell, task, rate), seed)
            if key in done:
                return done[key]
            if trials is None:
                model = task_model(cell.mixer, task, cell.width, cell.setting.depth, cell.setting.mlp)
                trials = Trials(model, task, cell.setting.steps, cell.setting.batch)
            place = f"[{passed}/{total}] {cell.task} {cell.mixer} width {cell.width} rate {rate:g} seed {seed}"
            made = _run(cell, task, trials, rate, seed, place) | {"digest": key[0]}
            results.add(made)
            trained += 1
            left = (time.perf_counter() - began) / trained * (total - passed)
            score = " ".join(f"{label}: {value:.2f}" for label, value in made["tests"].items())
            _say(f"{place}: validation {made['validation_accuracy']:.3f}, tests {score}; {left / 60:.0f} min left")
            return made

        rate = best_rate([row(rate, 0) for rate in rates])
        for seed in range(1, seeds):
            row(rate, seed)


def _run(cell: Cell, task, trials, rate: float, seed: int, place: str) -> dict:
    from archlab.analysis.accounts import count_parameters, state_bytes

    shown = time.perf_counter()

    def show(step: int, loss: float) -> None:
        nonlocal shown
        if time.perf_counter() - shown > 20:
            shown = time.perf_counter()
            _say(f"{place}: step {step}/{cell.setting.steps} loss {loss:.3f}")

    trial = trials.run(rate, seed, ROWS, show)
    rows = lambda test: max(16, min(ROWS, TOKENS // test.context))
    tests = {label: trials.test(trial.params, trial.rest, test, rows(test)).accuracy
             for label, test in task.tests().items()}
    config = trials.model
    return {"model": common.name_of(cell.mixer), "task": cell.task, "width": cell.width, "seed": seed,
            "learning_rate": rate, "steps": trial.steps, "batch": cell.setting.batch,
            "parameters": count_parameters(config).total, "state_bytes": state_bytes(config, task.context),
            "validation_accuracy": trial.validation.accuracy,
            "validation_loss": trial.validation.loss if not trial.diverged else 1e9,
            "validation_exact": trial.validation.exact, "diverged": trial.diverged,
            "seconds": round(trial.seconds, 1), "tests": tests}


def _digest(cell: Cell, task, rate: float) -> str:
    """What a run was, its seed apart: changed settings, or a changed file of one's own, are runs of their own."""
    from experiments.mixers import own_code, task_model

    model = task_model(cell.mixer, task, cell.width, cell.setting.depth, cell.setting.mlp)
    text = "\n".join([model.to_json(), task.to_json(), cell.to_json(), f"{rate:.6g}", *own_code(cell.mixer)])
    return "r" + hashlib.sha256(text.encode()).hexdigest()[:16]  # a letter first: no digest may read as a number


def _draw(cells: list[Cell], tasks: dict, rates: list[float], seeds: int, results: Rows, out: Path) -> None:
    from archlab.analysis.task_page import summarise, write_page

    done = _finished(results)
    keys = [(_digest(cell, tasks[cell.task], rate), seed) for cell in cells for rate in rates for seed in range(seeds)]
    rows = [done[key] for key in keys if key in done]
    table = summarise(rows, tasks)
    page = write_page(out, table, tasks, {
        "preset": FLAGS.preset, "learning rates": ", ".join(f"{rate:g}" for rate in rates), "seeds": seeds,
        **{name: ", ".join(f"{field} {value}" for field, value in (
            ("steps", next(c.setting.steps for c in cells if c.task == name)),
            ("batch", next(c.setting.batch for c in cells if c.task == name)))) for name in tasks}})
    print(f"\nmatrix: {out / 'matrix.csv'}\npictures: {page}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    common.run(main)
