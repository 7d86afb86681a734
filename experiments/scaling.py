"""Trains a ladder of sizes and budgets for any set of architectures, fits each one's law, and says on one page how much
compute one of them saves or costs against another at equal loss.

    python -m experiments.scaling --preset=smoke                    # prints the plan: runs, FLOPs, hours, memory
    python -m experiments.scaling --preset=smoke --run --out=runs/scaling
    python -m experiments.scaling --csv=table.csv                   # fits runs of others: columns C or N and D, loss

Leaves under --out: results.csv (a row per finished run, by which a call again does only what is missing), runs/ (each
with metrics and checkpoints), scaling.html (one file, no network), figures as PNG, fits.csv and multipliers.csv.

All formulas are in archlab/analysis/scaling/ladder.py, and the same for all architectures. Each size tries the same
multiples of the formula's learning rate (--rates) at the smallest budget that gives it 100 steps; the best goes on to
the larger budgets, which branch off from its trunk where its decay began (WSD). With --transfer only the smallest size
tries rates.

--workers=N shares the work out to N processes on this machine, --shard=I/N to jobs of an array or to several machines:
each does its part, and what any of them finished is one table (on one file system; or join them: --csv=a.csv,b.csv).

Expected, and cost: docs/scaling.md. On four CPU cores --preset=smoke takes 1 to 2 minutes, --preset=cpu-hour most of
an hour.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import sys
import time
from pathlib import Path

from absl import flags

from archlab.analysis.conventions import CONVENTIONS
from experiments import common, workers
from experiments.rows import Rows

PRESETS = {
    "smoke": dict(sizes=["6e3", "1.2e4", "2.4e4"], budgets=["8e9", "1.6e10", "3.2e10"], window=["0.05", "100"],
                  rates=["1"], seeds=1),
    "cpu-hour": dict(sizes=["6e3", "1.2e4", "2.4e4", "4.8e4", "9.6e4", "1.92e5", "3.84e5"],
                     budgets=["3e11", "9e11", "2.7e12", "8.1e12"], window=["1.2", "200"], rates=["0.5", "1", "2", "4"],
                     seeds=1),
}
LEAST, TRIAL = 20, 100  # steps of a run, and of one that tries a learning rate
THREE = ["transformer-tiny", "mixture-of-experts-tiny", "mamba-tiny"]

FLAGS = flags.FLAGS
flags.DEFINE_enum("preset", "cpu-hour", list(PRESETS), "smoke: does it run? cpu-hour: a real ladder, small.")
flags.DEFINE_bool("run", False, "Start, or go on. Without it the plan is printed and nothing is trained.")
flags.DEFINE_list("csv", None, "Fit these tables instead of training.")
flags.DEFINE_list("models", THREE, "Names of the zoo, or Python files of yours with a CONFIG: shapes to scale.")
flags.DEFINE_multi_string("set", [], "path=value: changes a field of every model's config. Repeatable.")
flags.DEFINE_list("sizes", None, "Parameters that a token meets, without tables. The preset's by default; `auto`:\n"
                  "from the budgets.")
flags.DEFINE_list("budgets", None, "Training FLOPs. The preset's by default.")
flags.DEFINE_list("window", None, "Least and most tokens a parameter: cells of the grid outside are not run. The\n"
                  "preset's by default.")
flags.DEFINE_list("rates", None, "Multiples of the formula's learning rate that each size tries. The preset's by\n"
                  "default.")
flags.DEFINE_integer("seeds", None, "Runs of each cell at the best rate. The preset's by default.")
flags.DEFINE_enum("transfer", "none", ["none", "mup", "completep"], "Carries the smallest size's learning rate over\n"
                  "to the others: over width (mup), and depth (completep).")
flags.DEFINE_string("data", "stdlib", "The corpus: stdlib, text:GLOB or tfds:NAME[/CONFIG].")
flags.DEFINE_string("tokenizer", "bytes", "bytes, bpe:VOCAB or the path of a tokenizer.json.")
flags.DEFINE_integer("context", 256, "Tokens a row.")
flags.DEFINE_integer("eval_rows", 128, "Validation rows behind each loss: the same for all.")
flags.DEFINE_integer("checkpoint_every", 1000, "Steps between checkpoints, besides those at branches and ends.")
flags.DEFINE_string("mesh", None, "Devices by axis, as data:2,fsdp:4. All on data.")
flags.DEFINE_bool("estimate", True, "Times a few steps of the smallest and the largest size for the plan.")
flags.DEFINE_enum("convention", "counted", CONVENTIONS, "What N is, and C = 6 N D with it.")
flags.DEFINE_string("reference", None, "The architecture that the others are compared with; the first by default.")
flags.DEFINE_string("loss", "loss", "With --csv: the column that holds the loss.")
flags.DEFINE_integer("repetitions", 1000, "Of the bootstrap.")
flags.DEFINE_enum("by", "residuals", ["residuals", "runs"], "What the bootstrap draws again.")
flags.DEFINE_string("out", "runs/scaling", "The folder of the study.")
workers.define_workers()

GROUPS = ("input_embedding", "head", "layers", "routed_experts", "total", "unique", "active", "active_computing",
          "applied")
FURTHER = ("experts", "active_experts", "granularity", "recursions", "N_once", "N_recurring")
FIELDS = ("architecture", "size", "width", "layers", "batch", "context", "steps", "tokens", "budget", "learning_rate",
          "factor", "warmup_steps", "seed", "role", "loss", "train_loss", "diverged", "seconds", "tokens_per_second",
          "corpus", "tokenizer", "transfer", "device", *(f"N:{name}" for name in CONVENTIONS),
          *(f"parameters:{name}" for name in GROUPS), *FURTHER, "digest")


@dataclasses.dataclass(frozen=True, eq=False)
class Climb:
    """A size of an architecture with its budgets, from the smallest on: what one process trains with one program.
    trial: the budget at which its learning rates are tried."""

    rung: "Rung"
    budgets: tuple[float, ...]
    trial: float
    rates: tuple[float, ...]
    seeds: int
    code: str

    def run(self, budget: float, factor: float, seed: int = 0):
        return self.rung.run(budget, self.trial, factor, seed, FLAGS.data, FLAGS.tokenizer)

    @property
    def flops(self) -> float:
        """Of all its runs: a trunk is trained once, a decay for each budget, and every rate on the budget of trials."""
        trunk, falls = 0.8 * self.budgets[-1], 0.2 * sum(self.budgets)
        return self.seeds * (trunk + falls) + (len(self.rates) - 1) * self.trial


class Ladder:
    """The work of a process: climbs, each run done once and kept as a row."""

    def __init__(self, climbs: list[Climb], corpus, tokenizer, rows: Rows, shard: str):
        self.climbs, self.corpus, self.tokenizer, self.rows, self.shard = climbs, corpus, tokenizer, rows, shard
        self.done = {(row["digest"], row["role"]): row for row in rows.read()}
        self.all = sum(climb.flops for climb in climbs)
        self.spent, self.trained, self.began = 0.0, 0.0, time.perf_counter()

    def climb(self, climb: Climb, first: Climb) -> None:
        """All runs of a size. first: the size at which rates are tried."""
        programs = Once(climb, self.tokenizer)
        factor = self._best(climb, first, programs)
        for seed in range(climb.seeds):
            before = self._folder(climb, climb.trial, factor, seed)
            for budget in climb.budgets:
                row = self._row(climb, budget, factor, seed, "run", before, programs)
                if row["diverged"]:
                    _say(f"{climb.rung.name} {climb.rung.size:.2g}: diverged at {budget:.2g} FLOPs; its larger budgets "
                         "would branch off from it and are left out")
                    break
                before = self._folder(climb, budget, factor, seed)

    def _best(self, climb: Climb, first: Climb, programs: "Once") -> float:
        """The factor of the learning rate with the lowest loss at the size where rates are tried: this one, or with
        transfer the architecture's smallest."""
        if len(first.rates) == 1:
            return first.rates[0]
        programs = programs if first is climb else Once(first, self.tokenizer)
        tried = {factor: self._row(first, first.trial, factor, 0, "trial", None, programs)
                 for factor in first.rates}
        best = min(tried, key=lambda factor: tried[factor]["loss"] if not tried[factor]["diverged"] else math.inf)
        for factor in tried:
            if factor != best:  # nothing branches off from it
                shutil.rmtree(self._folder(first, first.trial, factor, 0) / "checkpoints", ignore_errors=True)
        return best

    def _folder(self, climb: Climb, budget: float, factor: float, seed: int) -> Path:
        rung = climb.rung
        return (Path(FLAGS.out) / "runs" / (rung.name + ("" if FLAGS.transfer == "none" else f"-{FLAGS.transfer}"))
                / f"{rung.size:.3g}-{budget:.3g}-rate{factor:g}-seed{seed}")

    def _row(self, climb: Climb, budget: float, factor: float, seed: int, role: str, before: Path | None,
             programs: "Once") -> dict:
        run = climb.run(budget, factor, seed)
        digest = hashlib.sha256(f"{run.to_json()}\n{FLAGS.eval_rows}\n{climb.code}".encode()).hexdigest()[:16]
        row = self.done.get((digest, role))
        if row is None and (twin := self.done.get((digest, "trial"))) is not None:
            row = twin | {"role": role}  # the rate that was taken: its trial is the run
            self._keep(row)
        if row is None:
            row = self._train(climb, run, budget, factor, role, before, programs, digest,
                              self._folder(climb, budget, factor, seed))
            self._keep(row)
        return row

    def _keep(self, row: dict) -> None:
        self.rows.add(row)
        self.done[row["digest"], row["role"]] = row

    def _train(self, climb: Climb, run, budget: float, factor: float, role: str, before: Path | None, programs: "Once",
               digest: str, folder: Path) -> dict:
        import jax

        from archlab.layers.config import from_json
        from archlab.training.loop import train
        from archlab.training.recorder import Diverged

        rung = climb.rung
        name = f"{rung.name} {rung.size:.2g} params, {budget:.2g} FLOPs, rate {run.optimizer.learning_rate:.2g}"
        if folder.is_dir() and not _same(folder, run):
            raise ValueError(f"{folder} holds a run of other settings: give another --out, or remove it")
        trunk = before if before not in (None, folder) and (before / "checkpoints").is_dir() else None
        begun = from_json((trunk / "config.json").read_text()).branches_at if trunk else 0
        began = time.perf_counter()
        try:
            result = train(run, self.corpus, self.tokenizer, out=folder, mesh=programs.mesh, name=name, keep=1,
                           log_every=max(1, run.steps // 20), eval_batches=FLAGS.eval_rows // rung.batch,
                           checkpoint_every=FLAGS.checkpoint_every, branch_from=trunk, programs=programs.get(run),
                           flops_per_token=rung.flops_per_token, tensorboard=False, quiet=not sys.stderr.isatty())
            found = dict(loss=result.evaluation.bits_per_byte, train_loss=result.history[-1]["bits_per_byte"],
                         diverged=False, tokens_per_second=result.tokens_per_second)
        except Diverged as error:
            _say(f"{name}: {error}")
            found = dict(loss=math.nan, train_loss=math.nan, diverged=True, tokens_per_second=0.0)
        self.trained += (run.steps - begun) * rung.batch * rung.context * rung.flops_per_token
        self.spent += time.perf_counter() - began
        left = self.spent / self.trained * max(self.all - self.trained, 0)
        _say(f"[{self.shard}] {name}: {found['loss']:.3f} bits/byte; {left / 60:.0f} min left")
        return {"architecture": rung.name, "size": rung.size, "width": rung.model.width, "layers": rung.layers,
                "batch": rung.batch, "context": rung.context, "steps": run.steps, "tokens": run.tokens,
                "budget": budget, "learning_rate": run.optimizer.learning_rate, "factor": factor,
                "warmup_steps": round(run.optimizer.warmup * run.steps), "seed": run.seed, "role": role, **found,
                "seconds": round(time.perf_counter() - began, 2), "corpus": FLAGS.data, "tokenizer": FLAGS.tokenizer,
                "transfer": FLAGS.transfer, "device": jax.devices()[0].device_kind,
                **{f"N:{key}": rung.N[key] for key in CONVENTIONS},
                **{f"parameters:{key}": rung.parameters[key] for key in GROUPS},
                **{key: rung.parameters[key] for key in FURTHER}, "digest": digest}


class Once:
    """A size's programs, compiled when they are first needed."""

    def __init__(self, climb: Climb, tokenizer):
        self.tokenizer, self.programs, self.mesh = tokenizer, None, _mesh()

    def get(self, run):
        import jax

        from archlab.training.programs import Programs

        if self.programs is None:
            with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
                self.programs = Programs(run, self.tokenizer.bytes_per_token, self.mesh)
        return self.programs


def main() -> None:
    shard, shards = workers.shard_of(FLAGS.shard)
    for name in ("workers", "context", "eval_rows", "repetitions"):
        if getattr(FLAGS, name) < 1:
            raise ValueError(f"--{name} = {getattr(FLAGS, name)}: must be at least 1")
    out = Path(FLAGS.out)
    if FLAGS.csv:
        return _page(out, FLAGS.csv)
    climbs = _climbs()
    if not FLAGS.run:
        return _plan(climbs, shards)
    if FLAGS.workers > 1:
        workers.share("experiments.scaling", shard, shards, FLAGS.workers)
    else:
        _train(climbs, shard, shards, Rows(out / "results.csv", FIELDS))
    if shards == 1:
        _page(out, [out / "results.csv"])
    else:
        _say(f"shard {shard} of {shards} is done; the page of all: python -m experiments.scaling "
             f"--csv={out / 'results.csv'} --out={out}")


def _climbs() -> list[Climb]:
    """All the work: valid, or none of it begins. The dearest comes first."""
    from archlab.analysis.scaling.ladder import rungs, sizes_around
    from archlab.data import load_corpus, tokenizer_from
    from archlab.training.objectives import objective
    from archlab.zoo import list_models

    budgets = sorted(_numbers("budgets"))
    sizes = sizes_around(budgets) if _given("sizes") == ["auto"] else sorted(_numbers("sizes"))
    rates, (low, high), seeds = tuple(_numbers("rates")), _numbers("window", 2), _given("seeds")
    if seeds < 1:
        raise ValueError(f"--seeds = {seeds}: must be at least 1")
    files = common.named(FLAGS.models, list_models())
    vocab = tokenizer_from(FLAGS.tokenizer, load_corpus(FLAGS.data)).vocab
    climbs = []
    for name, file in files.items():
        config = common.model_config(file, FLAGS.set)
        if (kind := objective(config)) != "next token":
            raise ValueError(f"{name} is trained on the {kind}: its loss cannot stand beside that of the next token")
        code = Path(file).read_text() if file.endswith(".py") else ""
        for rung in rungs(name, config.set("vocab", max(config.vocab, vocab)), sizes, FLAGS.context, FLAGS.transfer):
            fits = lambda budget: low <= budget / (6 * rung.N["counted"] ** 2) <= high and rung.steps(budget) >= LEAST
            cells = tuple(filter(fits, budgets))
            if not cells:
                _say(f"{name} at {rung.size:,.0f} parameters is left out: no budget gives it {low:g} to {high:g} "
                     f"tokens a parameter in {LEAST} steps or more")
                continue
            if FLAGS.eval_rows % rung.batch:
                raise ValueError(f"--eval_rows = {FLAGS.eval_rows}: must be a multiple of {rung.batch}, the batch of "
                                 f"{name} at {rung.size:,.0f} parameters")
            trial = min((c for c in budgets if c <= cells[0] and rung.steps(c) >= TRIAL), default=cells[0])
            climbs.append(Climb(rung, cells, cells[0] if len(rates) == 1 else trial, rates, seeds, code))
        if not any(climb.rung.name == name for climb in climbs):
            raise ValueError(f"{name}: nothing is left to run; change --sizes, --budgets or --window")
    return sorted(climbs, key=lambda climb: climb.flops, reverse=True)


def _part(climbs: list[Climb], shard: int, shards: int) -> list[Climb]:
    """The shard's part: each climb, the dearest first, goes to who has least. All shards find the same."""
    loads, mine = [0.0] * shards, []
    for climb in climbs:
        least = loads.index(min(loads))
        loads[least] += climb.flops
        if least == shard:
            mine.append(climb)
    return mine


def _train(climbs: list[Climb], shard: int, shards: int, rows: Rows) -> None:
    from archlab.data import load_corpus, tokenizer_from

    corpus = load_corpus(FLAGS.data)
    Path(FLAGS.out).mkdir(parents=True, exist_ok=True)
    mine = _part(climbs, shard, shards)
    ladder = Ladder(mine, corpus, tokenizer_from(FLAGS.tokenizer, corpus), rows, f"{shard}/{shards}")
    for climb in mine:
        ladder.climb(climb, _first(climbs, climb))


def _first(climbs: list[Climb], climb: Climb) -> Climb:
    """Where a size's learning rate is found: with transfer at the architecture's smallest size."""
    if FLAGS.transfer == "none":
        return climb
    return min((other for other in climbs if other.rung.name == climb.rung.name), key=lambda other: other.rung.size)


def _plan(climbs: list[Climb], shards: int) -> None:
    """Prints what `--run` would do, and what it would cost here."""
    from rich.console import Console
    from rich.table import Table

    from archlab.analysis.accounts import short

    parts = shards * FLAGS.workers
    with workers.cores(0, FLAGS.workers):  # what is timed has those of one worker
        speeds = _speeds(climbs) if FLAGS.estimate else {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(("model", "size", "width", "layers", "batch", "rate", "FLOPs/token", "tokens, by budget",
                                "tokens/param.", "steps", "FLOPs", "minutes", "memory")):
        table.add_column(column, justify="right" if i else "left")
    for climb in sorted(climbs, key=lambda climb: (FLAGS.models.index(_file(climb)), climb.rung.size)):
        rung, runs = climb.rung, [climb.run(budget, 1.0) for budget in climb.budgets]
        speed, memory = speeds.get(rung, (None, None))
        per = [run.tokens / rung.N["counted"] for run in runs]
        table.add_row(rung.name, short(rung.size, False), str(rung.model.width), str(rung.layers),
                      f"{rung.batch} x {rung.context}", f"{rung.learning_rate:.2g}", short(rung.flops_per_token, False),
                      " ".join(short(run.tokens, False) for run in runs), f"{min(per):.1f} to {max(per):.1f}",
                      f"{runs[0].steps:,} to {runs[-1].steps:,}", f"{climb.flops:.2g}",
                      "–" if speed is None else f"{climb.flops / speed / 60:.1f}",
                      "–" if memory is None else short(memory, False) + "B")
    Console(width=180).print(table)
    runs = sum(climb.seeds * len(climb.budgets) for climb in climbs)
    trials = sum((len(climb.rates) - 1) for climb in climbs if _first(climbs, climb) is climb)
    print(f"\n{runs} runs and {trials} more of other learning rates, {sum(c.flops for c in climbs):.3g} FLOPs, in "
          f"{parts} part{'s' if parts > 1 else ''}")
    if speeds:
        hours = [sum(climb.flops / speeds[climb.rung][0] for climb in _part(climbs, i, parts)) / 3600
                 for i in range(parts)]
        print(f"about {max(hours):.2g} hours on this machine" + (f", each part on {1 / FLAGS.workers:.0%} of its cores"
              if FLAGS.workers > 1 else "") + ", as a few steps of the smallest and largest sizes went just now; "
              "compilation and evaluation come on top")
    print("nothing was trained: --run starts it")


def _speeds(climbs: list[Climb]) -> dict:
    """{rung: (training FLOP/s, bytes that a step holds)}: the smallest and the largest size of each architecture are
    timed, those between lie on a line through both in logarithms."""
    import numpy as np

    from archlab.data import load_corpus, tokenizer_from

    corpus = load_corpus(FLAGS.data)
    tokenizer, found = tokenizer_from(FLAGS.tokenizer, corpus), {}
    for name in dict.fromkeys(climb.rung.name for climb in climbs):
        own = sorted((c for c in climbs if c.rung.name == name), key=lambda climb: climb.rung.size)
        ends = {climb.rung.size: _timed(climb, corpus, tokenizer) for climb in {own[0], own[-1]}}
        sizes = np.log(sorted(ends))
        for climb in own:
            at = lambda i: float(np.exp(np.interp(np.log(climb.rung.size), sizes,
                                                  np.log([ends[size][i] for size in sorted(ends)]))))
            found[climb.rung] = at(0), at(1)
    return found


def _timed(climb: Climb, corpus, tokenizer) -> tuple[float, float]:
    """Training FLOP/s, the median of five steps; and the bytes that a step holds."""
    import statistics

    import jax

    from archlab.data import train_batches
    from archlab.parallel.mesh import global_batch

    rung, run = climb.rung, climb.run(climb.budgets[0], 1.0)
    _say(f"timing a few steps of {rung.name} at {rung.size:,.0f} parameters")
    once = Once(climb, tokenizer)
    programs = once.get(run)
    with contextlib.nullcontext() if once.mesh is None else jax.set_mesh(once.mesh):
        batches, state, seconds = train_batches(corpus, tokenizer, run.context, run.batch, 0), programs.create(0), []
        for _ in range(6):
            batch = next(batches) if once.mesh is None else global_batch(next(batches), once.mesh)
            began = time.perf_counter()
            state, metrics = programs.step(state, batch, 1e-3, 0)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
    return rung.flops_per_token * run.batch * run.context / statistics.median(seconds[1:]), programs.memory


def _page(out: Path, tables: list) -> None:
    from archlab.analysis.scaling.page import write_page
    from archlab.analysis.scaling.points import read_points

    reading = read_points(tables, FLAGS.convention, FLAGS.loss)
    settings = {} if FLAGS.csv else {
        **{name: ", ".join(_given(name)) for name in ("sizes", "budgets", "window", "rates")},
        "seeds": _given("seeds"), "transfer": FLAGS.transfer}
    page = write_page(out, reading, settings, "python -m experiments.scaling " + " ".join(sys.argv[1:]),
                      "loss" if FLAGS.csv else "bits per byte", FLAGS.reference, FLAGS.repetitions, FLAGS.by)
    print(f"\npictures: {page}\nfigures: {out / 'fits.csv'}, {out / 'multipliers.csv'}")


def _given(flag: str):
    """What a flag says, or else the preset."""
    value = getattr(FLAGS, flag)
    return PRESETS[FLAGS.preset][flag] if value is None else value


def _numbers(flag: str, count: int | None = None) -> list[float]:
    """The numbers of a flag, each above 0."""
    try:
        numbers = [float(text) for text in _given(flag)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) <= 0 or count not in (None, len(numbers)):
        two = "two " if count == 2 else ""
        raise ValueError(f"--{flag} = {','.join(_given(flag))}: must be {two}numbers above 0, as 1e6,3e6")
    return numbers


def _same(folder: Path, run) -> bool:
    """Whether a folder is of this run, or has none yet."""
    note = folder / "config.json"
    return not note.is_file() or json.loads(note.read_text()) == json.loads(run.to_json())


def _file(climb: Climb) -> str:
    return next(file for file in FLAGS.models if common.name_of(file) == climb.rung.name)


def _mesh():
    import jax

    from archlab.parallel.mesh import make_mesh

    return make_mesh(FLAGS.mesh) if FLAGS.mesh or jax.device_count() > 1 else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    common.run(main)
