"""The work of a scaling study: climbs, each a size of an architecture with its budgets, and the rows they leave."""

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
from archlab.analysis.scaling.ladder import Rung
from archlab.analysis.scaling.points import FURTHER
from experiments import common
from experiments.rows import Rows

FLAGS = flags.FLAGS
GROUPS = ("input_embedding", "head", "layers", "routed_experts", "total", "unique", "active", "active_computing",
          "applied")
FIELDS = ("architecture", "size", "width", "layers", "batch", "context", "steps", "tokens", "budget", "learning_rate",
          "factor", "warmup_steps", "seed", "role", "loss", "train_loss", "diverged", "seconds", "tokens_per_second",
          "corpus", "tokenizer", "eval_rows", "transfer", "device", *(f"N:{name}" for name in CONVENTIONS),
          *(f"parameters:{name}" for name in GROUPS), *FURTHER, "digest")


@dataclasses.dataclass(frozen=True, eq=False)
class Climb:
    """A size of an architecture with its budgets, from the smallest on: what one process trains with one program.

    trial: the budget at which its learning rates are tried. rates: none where they come from another size. file: the
    model's name, or its file.
    """

    rung: Rung
    budgets: tuple[float, ...]
    trial: float
    rates: tuple[float, ...]
    seeds: int
    file: str

    def run(self, budget: float, factor: float, seed: int = 0):
        return self.rung.run(budget, min(self.trial, *self.budgets), factor, seed, FLAGS.data, FLAGS.tokenizer)

    def digest(self, run) -> str:
        """By which a finished run is found again; it begins with a letter, so as never to be read as a number."""
        code = Path(self.file).read_text() if self.file.endswith(".py") else ""
        return "r" + hashlib.sha256(f"{run.to_json()}\n{FLAGS.eval_rows}\n{code}".encode()).hexdigest()[:16]

    @property
    def flops(self) -> float:
        """Of all its runs: a trunk is trained once, a decay for each budget, and every rate on the budget of trials."""
        trunk, falls = 0.8 * self.budgets[-1], 0.2 * sum(self.budgets)
        return self.seeds * (trunk + falls) + max(0, len(self.rates) - 1) * self.trial


class Ladder:
    """The work of a process: climbs, each run done once and kept as a row."""

    def __init__(self, climbs: list[Climb], corpus, tokenizer, rows: Rows, shard: str):
        self.climbs, self.corpus, self.tokenizer, self.rows, self.shard = climbs, corpus, tokenizer, rows, shard
        self.done = {(row["digest"], row["role"]): row for row in rows.read()}
        self.all = sum(climb.flops for climb in climbs)
        self.spent, self.trained = 0.0, 0.0

    def climb(self, climb: Climb, first: Climb) -> None:
        """All runs of a size. first: the size at which rates are tried."""
        programs = Once(climb, self.tokenizer)
        factor = self.best(first, programs if first is climb else Once(first, self.tokenizer))
        for seed in range(climb.seeds):
            before = self._folder(climb, climb.trial, factor, seed)
            for budget in climb.budgets:
                row = self._row(climb, budget, factor, seed, "run", before, programs)
                if row["diverged"]:
                    say(f"{climb.rung.name} {climb.rung.size:.2g}: diverged at {budget:.2g} FLOPs; its larger budgets "
                         "would branch off from it and are left out")
                    break
                before = self._folder(climb, budget, factor, seed)

    def best(self, first: Climb, programs: "Once") -> float:
        """The factor of the learning rate with the lowest loss at the size where rates are tried. Where that is the
        work of another process, its runs leave rows here too, but no folders: two must not write into one."""
        if len(first.rates) == 1:
            return first.rates[0]
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
        digest = climb.digest(run)
        row = self.done.get((digest, role))
        if row is None and (twin := self.done.get((digest, "trial"))) is not None:
            row = twin | {"role": role}  # the rate that was taken: its trial is the run
            self._keep(row)
        if row is None:
            folder = self._folder(climb, budget, factor, seed) if climb in self.climbs else None
            row = self._train(climb, run, budget, factor, role, before, programs, digest, folder)
            self._keep(row)
        return row

    def _keep(self, row: dict) -> None:
        self.rows.add(row)
        self.done[row["digest"], row["role"]] = row

    def _train(self, climb: Climb, run, budget: float, factor: float, role: str, before: Path | None, programs: "Once",
               digest: str, folder: Path | None) -> dict:
        import jax

        from archlab.layers.config import from_json
        from archlab.training.loop import train
        from archlab.training.recorder import Diverged

        rung = climb.rung
        name = f"{rung.name} {rung.size:.2g} params, {budget:.2g} FLOPs, rate {run.optimizer.learning_rate:.2g}"
        if folder is not None:
            if not _same(folder, run):
                raise ValueError(f"{folder} holds a run of other settings: give another --out, or remove it")
            common.same_code(folder, climb.file)
        trunk, begun = None, 0
        if before is not None and before != folder and (before / "config.json").is_file():
            begun = from_json((before / "config.json").read_text()).branches_at
            whole = (before / "checkpoints" / str(begun)).is_dir()  # it is there once all of it is written
            trunk = before if whole and 0 < begun <= run.branches_at else None
        began = time.perf_counter()
        try:
            result = train(run, self.corpus, self.tokenizer, out=folder, mesh=programs.mesh, name=name, keep=1,
                           log_every=max(1, run.steps // 20), eval_batches=FLAGS.eval_rows // rung.batch,
                           checkpoint_every=FLAGS.checkpoint_every, branch_from=trunk, programs=programs.get(run),
                           flops_per_token=rung.flops_per_token, tensorboard=False, quiet=not sys.stderr.isatty())
            found = dict(loss=result.evaluation.bits_per_byte, train_loss=result.history[-1]["bits_per_byte"],
                         diverged=False, tokens_per_second=result.tokens_per_second or None,
                         seconds=result.history[-1]["seconds"])
        except Diverged as error:
            say(f"{name}: {error}")
            found = dict(loss=math.nan, train_loss=math.nan, diverged=True, tokens_per_second=None, seconds=None)
        self.trained += (run.steps - (begun if trunk else 0)) * rung.batch * rung.context * rung.flops_per_token
        self.spent += time.perf_counter() - began
        left = self.spent / self.trained * max(self.all - self.trained, 0)
        say(f"[{self.shard}] {name}: {found['loss']:.3f} bits/byte; {left / 60:.0f} min left")
        return {"architecture": rung.name, "size": rung.size, "width": rung.model.width, "layers": rung.layers,
                "batch": rung.batch, "context": rung.context, "steps": run.steps, "tokens": run.tokens,
                "budget": budget, "learning_rate": run.optimizer.learning_rate, "factor": factor,
                "warmup_steps": round(run.optimizer.warmup * run.steps), "seed": run.seed, "role": role, **found,
                "corpus": FLAGS.data, "tokenizer": FLAGS.tokenizer,
                "eval_rows": FLAGS.eval_rows, "transfer": FLAGS.transfer, "device": jax.devices()[0].device_kind,
                **{f"N:{key}": rung.N[key] for key in CONVENTIONS},
                **{f"parameters:{key}": rung.parameters[key] for key in GROUPS},
                **{key: rung.parameters[key] for key in FURTHER}, "digest": digest}


class Once:
    """A size's programs, compiled when they are first needed."""

    def __init__(self, climb: Climb, tokenizer):
        self.tokenizer, self.programs, self.mesh = tokenizer, None, mesh()

    def get(self, run):
        import jax

        from archlab.training.programs import Programs

        if self.programs is None:
            with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
                self.programs = Programs(run, self.tokenizer.bytes_per_token, self.mesh)
        return self.programs


def rates_at(climbs: list[Climb], climb: Climb) -> Climb:
    """Where a size's learning rate is found: with transfer at the architecture's smallest size."""
    if FLAGS.transfer == "none":
        return climb
    return min((other for other in climbs if other.rung.name == climb.rung.name), key=lambda other: other.rung.size)


def _same(folder: Path, run) -> bool:
    """Whether a folder is of this run, or has none yet."""
    note = folder / "config.json"
    return not note.is_file() or json.loads(note.read_text()) == json.loads(run.to_json())


def mesh():
    import jax

    from archlab.parallel.mesh import make_mesh

    return make_mesh(FLAGS.mesh) if FLAGS.mesh or jax.device_count() > 1 else None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
