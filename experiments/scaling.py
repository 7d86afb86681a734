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

Expected, and cost: docs/scaling.md. On four CPU cores --preset=smoke takes about 1.5 minutes, --preset=cpu-hour most
of an hour.
"""

import csv
import sys
from pathlib import Path

from absl import flags

from archlab.analysis.conventions import CONVENTIONS
from archlab.layers.config import near
from experiments import common, scaling_plan, workers
from experiments.rows import Rows
from experiments.scaling_runs import FIELDS, Climb, Ladder, Once, rates_at, say

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
flags.DEFINE_string("law", "dense", "joint-experts, fine-grained-experts or recursive: also one law for all, such as\n"
                    "mixtures of several numbers of experts, or models of several recursions.")
flags.DEFINE_string("reference", None, "The architecture that the others are compared with; the first by default.")
flags.DEFINE_string("loss", "loss", "With --csv: the column that holds the loss.")
flags.DEFINE_integer("repetitions", 1000, "Of the bootstrap.")
flags.DEFINE_enum("by", "residuals", ["residuals", "runs"], "What the bootstrap draws again.")
flags.DEFINE_string("out", "runs/scaling", "The folder of the study; with --csv that of the first table by default.")
workers.define_workers()


@flags.validator("law")
def _known(law: str) -> bool:
    from archlab.analysis.scaling.pooled import law_named

    try:
        return bool(law_named(law))
    except ValueError as error:
        raise flags.ValidationError(str(error)) from None


def main() -> None:
    import jax

    shard, shards = workers.shard_of(FLAGS.shard)
    for name in ("workers", "context", "eval_rows", "repetitions"):
        if getattr(FLAGS, name) < 1:
            raise ValueError(f"--{name} = {getattr(FLAGS, name)}: must be at least 1")
    if FLAGS.workers > 1 and jax.default_backend() != "cpu":
        raise ValueError(f"--workers = {FLAGS.workers}: they share a CPU's cores; on accelerators start a process for "
                         "each device with --shard=I/N")
    out = Path(FLAGS.out)
    if FLAGS.csv:
        for table in FLAGS.csv:
            if not Path(table).is_file():
                raise ValueError(f"--csv: there is no file {table}")
        return _page(out if FLAGS["out"].present else Path(FLAGS.csv[0]).parent, FLAGS.csv)
    climbs = _climbs()
    if not FLAGS.run:
        return scaling_plan.show(climbs, shards)
    rows = Rows(out / "results.csv", FIELDS)
    if FLAGS.transfer != "none" and not FLAGS.part:  # all sizes wait for the rates of the smallest
        ladder = _ladder(climbs if shard == 0 else [], rows, shard, shards)
        for first in dict.fromkeys(rates_at(climbs, climb) for climb in climbs):
            ladder.best(first, Once(first, ladder.tokenizer))
    if FLAGS.workers > 1:
        costs = [climb.flops for climb in climbs[shard::shards]]  # one climb a part: who is free takes the next
        costs += [0.0] * (-(-len(climbs) // shards) - len(costs))
        workers.share("experiments.scaling", shard, shards, FLAGS.workers, costs)
    else:
        ladder = _ladder(climbs[shard::shards], rows, shard, shards)
        for climb in ladder.climbs:
            ladder.climb(climb, rates_at(climbs, climb))
    if shards == 1:
        _page(out, [out / "results.csv"])
    elif not FLAGS.part:
        say(f"shard {shard} of {shards} is done; the page of all: python -m experiments.scaling "
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
    if low >= high:
        raise ValueError(f"--window = {low:g},{high:g}: the first must be below the second")
    files = common.named(FLAGS.models, list_models())
    if FLAGS.reference not in (None, *files):
        raise ValueError(f"--reference = {FLAGS.reference}: {near(FLAGS.reference, files)}")
    vocab = tokenizer_from(FLAGS.tokenizer, load_corpus(FLAGS.data)).vocab
    climbs = []
    for name, file in files.items():
        config = common.model_config(file, FLAGS.set)
        if (kind := objective(config)) != "next token":
            raise ValueError(f"{name} is trained on the {kind}: its loss cannot stand beside that of the next token")
        for rung in rungs(name, config.set("vocab", max(config.vocab, vocab)), sizes, FLAGS.context, FLAGS.transfer):
            fits = lambda budget: low <= budget / (6 * rung.N["counted"] ** 2) <= high and rung.steps(budget) >= LEAST
            cells = tuple(filter(fits, budgets))
            if not cells:
                say(f"{name} at {rung.size:,.0f} parameters is left out: no budget gives it {low:g} to {high:g} "
                    f"tokens a parameter in {LEAST} steps or more")
                continue
            if FLAGS.eval_rows % rung.batch:
                raise ValueError(f"--eval_rows = {FLAGS.eval_rows}: must be a multiple of {rung.batch}, the batch of "
                                 f"{name} at {rung.size:,.0f} parameters")
            trials = (c for c in budgets if rung.steps(c) >= TRIAL and (c <= cells[0] or c in cells))
            trial = cells[0] if len(rates) == 1 else min(trials, default=cells[-1])
            first = FLAGS.transfer == "none" or all(climb.rung.name != name for climb in climbs)
            own = rates if first else ()  # rungs come from the smallest on
            climbs.append(Climb(rung, cells, trial, own, seeds, file))
        if not any(climb.rung.name == name for climb in climbs):
            raise ValueError(f"{name}: nothing is left to run; change --sizes, --budgets or --window")
    return sorted(climbs, key=lambda climb: climb.flops, reverse=True)


def _ladder(climbs: list[Climb], rows: Rows, shard: int, shards: int) -> Ladder:
    from archlab.data import load_corpus, tokenizer_from

    corpus = load_corpus(FLAGS.data)
    Path(FLAGS.out).mkdir(parents=True, exist_ok=True)
    return Ladder(climbs, corpus, tokenizer_from(FLAGS.tokenizer, corpus), rows, f"{shard}/{shards}")


def _page(out: Path, tables: list) -> None:
    from archlab.analysis.scaling.laws import DENSE
    from archlab.analysis.scaling.page import write_page
    from archlab.analysis.scaling.points import AS_GIVEN, read_points
    from archlab.analysis.scaling.pooled import law_named, pooled

    reading = read_points(tables, FLAGS.convention, FLAGS.loss)
    own = AS_GIVEN not in reading.about["convention"]
    settings = {"best rate at the edge of those tried": _at_edge(tables)} if own else {}
    if not FLAGS.csv:
        settings |= {**{name: ", ".join(_given(name)) for name in ("sizes", "budgets", "window", "rates")},
                     "seeds": _given("seeds"), "transfer": FLAGS.transfer}
    law = law_named(FLAGS.law)
    one_law = None if law == DENSE else pooled(reading.points, law, FLAGS.repetitions, FLAGS.by)
    page = write_page(out, reading, settings, "python -m experiments.scaling " + " ".join(sys.argv[1:]),
                      "bits per byte" if own else FLAGS.loss, FLAGS.reference, FLAGS.repetitions, FLAGS.by,
                      one_law)
    written = ("fits.csv", "multipliers.csv", *["pooled.csv"] * bool(one_law))
    _tell(out)
    print(f"\npictures: {page}\nfigures: {', '.join(str(out / name) for name in written)}")
    if one_law and one_law.study.refused:
        raise ValueError(f"--law = {FLAGS.law}: {one_law.study.refused}; all else is on the page")


def _tell(out: Path) -> None:
    """Prints what was found, at the least loss that both reached; ends the process where no law could be fitted."""
    rows = {row["architecture"]: row for row in csv.DictReader((out / "multipliers.csv").read_text().splitlines())}
    for name, row in rows.items():
        ratio, low, high = (float(row[key]) for key in ("ratio", "low", "high"))
        print(f"{name}: {ratio:.2f} times the compute of {row['reference']} at a loss of {float(row['loss']):.3f} "
              f"({low:.2f} to {high:.2f}): {row['verdict']}")
    if len((out / "fits.csv").read_text().splitlines()) < 2:
        common.leave(f"no architecture has runs that a law can be fitted to; {out / 'scaling.html'} says why")


def _at_edge(tables: list) -> str:
    """At how many sizes the learning rate that was taken is the least or the largest of those tried: there a better one
    may lie beyond."""
    tried, taken = {}, {}
    for row in (row for table in tables for row in csv.DictReader(Path(table).read_text().splitlines())):
        size, factor = (row.get("architecture"), row.get("size"), row.get("transfer")), row.get("factor")
        if row.get("role") == "trial" and factor:
            tried.setdefault(size, set()).add(float(factor))
        elif factor:
            taken[size] = float(factor)
    at_edge = [size for size in tried.keys() & taken.keys() if taken[size] in (min(tried[size]), max(tried[size]))]
    return f"at {len(at_edge)} of {len(tried)} sizes" if tried else "one rate only was tried"


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


if __name__ == "__main__":
    common.run(main)
