"""Reproduces, at the size of a laptop, what the literature found about mixtures of experts; three seeds for each.

    python -m experiments.moe_ablation --out=runs/moe_ablation

Five studies of one small decoder, whose arms differ in their feed-forward layers alone and read the same text in the
same order, at one learning rate:

experts    Switch (arXiv:2101.03961, appendix D): 2, 4 and 8 experts of which a token goes to one, against the dense
           model of the same FLOPs. Expected: the more experts, the lower the loss.
designs    DeepSeekMoE (arXiv:2401.06066, table 1): at equal active parameters, and equal total ones but for dense.
           Expected, best first: shared and fine-grained, the best two of many, the best one, dense.
balancing  Balance by a bias that the load steers (arXiv:2408.15664, table 2) against a loss. Expected: a MaxVio near
           0.04 instead of 0.7, at no worse loss.
collapse   A router that nothing balances. Expected: it leaves most experts out.
stability  Switch, sections 2.2 and 2.4: initial weights of a tenth of the usual variance, and a router in float32 where
           all else is bfloat16. Expected: lower loss, and seeds closer together, with both.

MaxVio is max(load) / mean(load) - 1 over all validation text, the worst layer; starved the share of experts under a
tenth of their fair load. Prints a table and what held; leaves results.csv, a figure and each run's folder under --out.
Called again it trains only what is missing. What came of it: docs/experts.md, with its cost.
"""

import dataclasses
import json
import math
import statistics
from pathlib import Path

from absl import flags

from archlab.analysis.paired import half_interval, told_apart
from archlab.experts.balance import SwitchLoss, ZLoss
from archlab.experts.capacity import Capacity
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK, TopKModule
from archlab.layers.config import near
from archlab.layers.mlp import SwiGLU
from archlab.layers.sequence import Parallel
from experiments import common


class LowPrecisionTopK(TopK):
    """`TopK` whose logits are rounded to bfloat16, weights and inputs too: what Switch's section 2.4 warns of."""

    def build(self, rngs, at, experts, scale):
        return LowPrecisionModule(self, rngs, at, experts, scale)


class LowPrecisionModule(TopKModule):
    def __call__(self, x, tokens):
        import jax.numpy as jnp

        low = lambda a: a.astype(jnp.bfloat16)
        return self.config(jnp.einsum("BTD,DE->BTE", low(x), low(self.weight[...])))


@dataclasses.dataclass(frozen=True)
class Preset:
    """A budget: hidden is F of the dense model; rows and context of each step."""

    width: int
    depth: int
    heads: int
    hidden: int
    steps: int
    rows: int
    context: int
    seeds: int
    eval_batches: int


PRESETS = {"standard": Preset(96, 3, 3, hidden=192, steps=400, rows=16, context=128, seeds=3, eval_batches=16),
           "smoke": Preset(16, 1, 2, hidden=32, steps=3, rows=2, context=16, seeds=1, eval_batches=1)}
STUDIES = ("experts", "designs", "balancing", "collapse", "stability")
EVEN = (SwitchLoss(0.01), ZLoss(0.001))

FLAGS = flags.FLAGS
flags.DEFINE_list("studies", list(STUDIES), f"Some of {', '.join(STUDIES)}.")
flags.DEFINE_enum("preset", "standard", list(PRESETS), "standard: as documented; smoke: a minute, to see that it runs.")
flags.DEFINE_float("learning_rate", 3e-3, "Of all arms.")
flags.DEFINE_string("data", "stdlib", "The corpus: stdlib, text:GLOB or tfds:NAME[/CONFIG]. Tokens are bytes.")
flags.DEFINE_string("out", "runs/moe_ablation", "The folder of the experiment.")


def arms(study: str, preset: Preset) -> dict:
    """{name: feed-forward layer}, in the order in which the literature has them, worst first."""
    F = preset.hidden
    switch = lambda experts, **fields: MoE(experts, F, **dict(router=TopK(1, jitter=0.01), capacity=Capacity(1.25),
                                                              balance=EVEN) | fields)
    if study == "experts":
        return {"dense": SwiGLU(F)} | {f"{n} experts": switch(n) for n in (2, 4, 8)}
    if study == "designs":  # 8 F of experts in all, F of them active
        fine = MoE(31, F // 4, TopK(3), balance=EVEN)
        return {"dense": SwiGLU(F), "top-1 of 8": MoE(8, F, TopK(1), balance=EVEN),
                "top-2 of 16": MoE(16, F // 2, TopK(2, renormalise=True), balance=EVEN),
                "shared + 3 of 31": Parallel(fine, SwiGLU(F // 4))}
    if study == "balancing":
        of = lambda rate, *losses: MoE(16, F // 4, TopK(4, "sigmoid", True, balance_rate=rate), balance=losses)
        sequence = SwitchLoss(1e-4, per="sequence")
        return {"loss 0.01": of(0.0, SwitchLoss(0.01)), "bias 0.001": of(0.001, sequence),
                "bias 0.01": of(0.01, sequence)}
    if study == "collapse":
        return {"nothing": MoE(8, F, TopK(1), balance=()), "loss 0.01": MoE(8, F, TopK(1), balance=(SwitchLoss(0.01),))}
    low = LowPrecisionTopK(1)
    return {"init 1, bfloat16 router": switch(8, router=low), "init 1, float32 router": switch(8, router=TopK(1)),
            "init 0.1, bfloat16 router": switch(8, router=low, init_scale=0.1),
            "init 0.1, float32 router": switch(8, router=TopK(1), init_scale=0.1)}


def model(layer, study: str, preset: Preset):
    """A decoder with this feed-forward layer in every block."""
    from archlab.attention.attention import Attention
    from archlab.layers.repeat import Repeat
    from archlab.layers.residual import Residual
    from archlab.layers.sequence import Sequence
    from archlab.model import LanguageModel

    block = Sequence(Residual(Attention(preset.heads)), Residual(layer))
    dtype = "bfloat16" if study == "stability" else None
    return LanguageModel(256, preset.width, Repeat(block, preset.depth), dtype=dtype)


def loads(trained, batches):
    """Each layer's load over all batches, without training: [layers, E]; None without experts."""
    import jax
    import numpy as np

    from archlab.training.objectives import run

    @jax.jit
    def of(model, batch):
        return [load for key, load in run(model, batch).aux.traces.items() if key.split("/")[-1] == "load"]

    found = [of(trained, batch) for batch in batches]
    return np.mean([np.concatenate(layers) for layers in found], 0) if found[0] else None


def measure(study: str, name: str, layer, seed: int, preset: Preset, corpus, tokenizer) -> dict:
    """The row of one run, from its folder if it is there."""
    from archlab.analysis.accounts import profile
    from archlab.data import validation_batches
    from archlab.training.loop import Run, train
    from archlab.training.optimizers import Optimizer
    from archlab.training.recorder import Diverged

    config = model(layer, study, preset)
    run = Run(config, preset.steps, preset.rows, preset.context, FLAGS.data, seed=seed,
              optimizer=Optimizer(learning_rate=FLAGS.learning_rate))
    folder = Path(FLAGS.out) / "runs" / study / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
    done = folder / "result.json"
    if done.is_file():
        row = json.loads(done.read_text())
        if row.pop("run") != json.loads(run.to_json()):
            raise ValueError(f"{folder} holds a run of other settings: give another --out, or remove it")
        return row
    accounts = profile(config, preset.context)
    row = {"study": study, "arm": name, "seed": seed, "active_parameters": accounts.parameters.active_body,
           "parameters": accounts.parameters.total - accounts.parameters.embedding,
           "training_flops_per_token": accounts.training.total, "tokens_per_second": math.nan,
           "max_violation": math.nan, "starved": math.nan, "diverged": ""}
    try:
        result = train(run, corpus, tokenizer, out=folder, name=f"{study}: {name}, seed {seed}", tensorboard=False,
                       eval_batches=preset.eval_batches)
        load = loads(result.model, validation_batches(corpus, tokenizer, preset.context, preset.rows,
                                                      preset.eval_batches))
        row |= {"bits_per_byte": result.evaluation.bits_per_byte, "tokens_per_second": result.tokens_per_second}
        if load is not None:
            fair = load * load.shape[1]
            row |= {"max_violation": float(fair.max() - 1), "starved": float((fair < 0.1).mean())}
    except Diverged as error:
        row |= {"bits_per_byte": math.inf, "diverged": str(error)}
        folder.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps(row | {"run": json.loads(run.to_json())}))
    return row


def summarise(rows: list[dict]) -> list[dict]:
    """A row for each arm: means over seeds, and half of a 95% interval of the loss."""
    table = []
    for study, name in dict.fromkeys((row["study"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["study"], row["arm"]) == (study, name)]
        bits = [row["bits_per_byte"] for row in mine]
        mean = lambda key: statistics.fmean(row[key] for row in mine)
        table.append({"study": study, "arm": name, "seeds": len(mine), "bits_per_byte": statistics.fmean(bits),
                      "interval": half_interval(bits),
                      **{key: mean(key) for key in ("max_violation", "starved", "tokens_per_second")},
                      **{key: mine[0][key] for key in ("active_parameters", "parameters", "training_flops_per_token")}})
    return table


def verdicts(rows: list[dict], table: list[dict]) -> list[str]:
    """What held of each expectation, in words. Of one seed nothing is said."""
    bits = {(row["study"], row["arm"], row["seed"]): row["bits_per_byte"] for row in rows}
    lines = []
    for study in dict.fromkeys(row["study"] for row in table):
        mine = [row for row in table if row["study"] == study]
        for worse, better in zip(mine, mine[1:]) if mine[0]["seeds"] > 1 else ():
            names = better["arm"], worse["arm"]
            gaps = [bits[study, names[1], seed] - bits[study, names[0], seed] for seed in range(worse["seeds"])]
            lines.append(f"{study}: {told_apart(*names, gaps)}")
        lines += [f"{study}: {row['arm']!r} has MaxVio {row['max_violation']:.2f}, {row['starved']:.0%} of its experts "
                  "starved" for row in mine if study in ("balancing", "collapse")]
    return lines


def as_text(table: list[dict]) -> str:
    heads = ("bits/byte", "+-", "active", "total", "MaxVio", "starved")
    lines = [f"{'study':<11}{'arm':<27}" + "".join(f"{head:>10}" for head in heads)]
    for row in table:
        cells = (f"{row['bits_per_byte']:>10.4f}{row['interval']:>10.4f}{row['active_parameters']:>10,}"
                 f"{row['parameters']:>10,}")
        load = "" if math.isnan(row["max_violation"]) else f"{row['max_violation']:>10.2f}{row['starved']:>10.0%}"
        lines.append(f"{row['study']:<11}{row['arm']:<27}{cells}{load}")
    return "\n".join(lines)


def draw(out: Path, rows: list[dict], table: list[dict]) -> None:
    """One figure: for each study its arms, each seed a dot, means with their intervals."""
    from archlab.analysis import plots

    bits = lambda row: [r["bits_per_byte"] for r in rows if (r["study"], r["arm"]) == (row["study"], row["arm"])]
    groups = {}
    for row in table:
        groups.setdefault(row["study"], []).append((row["arm"], bits(row), row["interval"]))
    plots.save(plots.intervals(groups, "validation bits per byte"), out / "ablation.png")


def main() -> None:
    from archlab.analysis.comparison import write_csv
    from archlab.data import load_corpus, tokenizer_from

    unknown = [study for study in FLAGS.studies if study not in STUDIES]
    if unknown or not FLAGS.studies:
        raise ValueError(f"--studies has {unknown[0]!r}: {near(unknown[0], STUDIES)}" if unknown else
                         f"--studies is empty: give some of {', '.join(STUDIES)}")
    preset, out = PRESETS[FLAGS.preset], Path(FLAGS.out)
    corpus, tokenizer = load_corpus(FLAGS.data), tokenizer_from("bytes", None)
    rows = []
    for study in FLAGS.studies:
        for seed in range(preset.seeds):
            for name, layer in arms(study, preset).items():
                rows.append(measure(study, name, layer, seed, preset, corpus, tokenizer))
    table = summarise(sorted(rows, key=lambda row: FLAGS.studies.index(row["study"])))
    write_csv(out / "runs.csv", rows)
    write_csv(out / "results.csv", table)
    draw(out, rows, table)
    print("\n" + as_text(table) + "\n\n" + "\n".join(verdicts(rows, table)))
    print(f"\nfigure: {out / 'ablation.png'}\nevery number: {out / 'results.csv'}, {out / 'runs.csv'}")


if __name__ == "__main__":
    common.run(main)
