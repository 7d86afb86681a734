"""Trains several architectures on the same text under the same budget, and draws what came of it.

    python -m experiments.compare --preset=quick --out=runs/compare

Leaves under --out: results.csv (a row per architecture), runs.csv (a row per training run), report.html (one file, no
network), figures as PNG, and each run's folder with metrics and checkpoints. Called again it does only what is missing.

--data=task:NAME takes a synthetic task (docs/tasks.md) for a text: figures are then bits per answer and the accuracy of
the likeliest answer, on scored tokens only, and never bits per byte, and each model's vocabulary is the task's.
experiments.tasks compares mixers alone.

--match=flops (the default): equal training FLOPs, so the numbers of tokens differ; all read one order of the data from
its start. --match=params: widths are changed until active parameters without embeddings agree within 3%, and all read
the same tokens. Every model gets the same number of learning-rate trials, of one full run each.

Expected: docs/comparison.md. Cost on four CPU cores: --preset=quick 4 to 5 minutes, --preset=hour about half an hour.
"""

import json
import os
import sys
import time
from pathlib import Path

from absl import flags

from archlab.analysis import comparison
from experiments import common

SIX = ["transformer-tiny", "universal-transformer-tiny", "mixture-of-experts-tiny", "mamba-tiny",
       "mixture-of-recursions-tiny", "jamba-tiny"]
# The best of 1e-3, 3e-3 and 9e-3 for each at the presets' budget (docs/comparison.md); others start at 3e-3.
LEARNING_RATES = {"transformer-tiny": 1e-3, "universal-transformer-tiny": 1e-3, "mixture-of-experts-tiny": 3e-3,
                  "mamba-tiny": 3e-3, "mixture-of-recursions-tiny": 1e-3, "jamba-tiny": 3e-3}
PRESETS = {"quick": dict(flops=1.2e12, seeds=1, lr_trials=1), "hour": dict(flops=1.2e12, seeds=3, lr_trials=3)}

FLAGS = flags.FLAGS
flags.DEFINE_list("models", SIX, "Names of the zoo, or Python files of yours with a CONFIG.")
flags.DEFINE_multi_string("set", [], "path=value: changes a field of every model's config. Repeatable.")
flags.DEFINE_enum("preset", "quick", list(PRESETS), "quick: one seed; hour: three seeds, three learning rates.")
flags.DEFINE_enum("match", "flops", ["flops", "params"], "What is equal: training FLOPs; or active parameters,\n"
                  "to which all but the first model are brought by their width.")
flags.DEFINE_float("flops", None, "Training FLOPs a run, with --match=flops. The preset's by default.")
flags.DEFINE_float("tokens", None, "Tokens a run, with --match=params. As many as the first model gets by default.")
flags.DEFINE_integer("seeds", None, "Runs of each model at its best learning rate. The preset's by default.")
flags.DEFINE_integer("lr_trials", None, "Learning rates tried for each model, each 3 times the last.")
flags.DEFINE_string("data", "stdlib", "The corpus: stdlib, text:GLOB or tfds:NAME[/CONFIG]; or task:NAME.")
flags.DEFINE_string("tokenizer", "bytes", "bytes, bpe:VOCAB or the path of a tokenizer.json.")
flags.DEFINE_integer("batch", 4, "Rows a step.")
flags.DEFINE_integer("context", None, "Tokens a row: 256 by default, and as many as a task has.")
flags.DEFINE_integer("eval_batches", 16, "Validation batches behind each figure: the same for every model.")
flags.DEFINE_string("out", "runs/compare", "The folder of the comparison.")



class Work:
    """The training runs of a comparison, each done once and kept in a folder with its `result.json`."""

    def __init__(self, corpus, tokenizer, total: int):
        self.corpus, self.tokenizer, self.total = corpus, tokenizer, total
        self.rows, self.began, self.trained = [], time.perf_counter(), 0

    def row(self, name: str, run, flops_per_token: float) -> dict:
        """The figures of one run: from its folder if it is finished there, else by training (or going on with) it."""
        folder = Path(FLAGS.out) / "runs" / f"{name}-lr{run.optimizer.learning_rate:.1e}-seed{run.seed}"
        done = folder / "result.json"
        if done.is_file():
            row = json.loads(done.read_text())
            if row["run"] != json.loads(run.to_json()):
                raise ValueError(f"{folder} holds a run of other settings: give another --out, or remove it")
        else:
            row = self._train(name, run, flops_per_token, folder)
            part = done.with_suffix(".part")
            part.write_text(json.dumps(row))
            os.replace(part, done)
        self.rows.append(row)
        return row

    def _train(self, name: str, run, flops_per_token: float, folder: Path) -> dict:
        from archlab.analysis.accounts import state_bytes
        from archlab.data import validation_batches
        from archlab.inference.timing import time_generation
        from archlab.training.accuracy import make_score_step, score
        from archlab.training.look_ahead import look_ahead, make_look_ahead_step
        from archlab.training.loop import train

        place = f"[{len(self.rows) + 1}/{self.total}] {name}"
        result = train(run, self.corpus, self.tokenizer, out=folder, name=place, eval_every=max(1, run.steps // 6),
                       eval_batches=FLAGS.eval_batches, flops_per_token=flops_per_token, tensorboard=False)
        model = result.model
        speed = time_generation(model, context=run.context, new_tokens=32)
        measure, accuracy = comparison.TEXT, {}
        if run.data.startswith("task:"):
            measure = comparison.TASK
            held_out = validation_batches(self.corpus, self.tokenizer, run.context, run.batch, FLAGS.eval_batches)
            found = score(make_score_step(result.structure), result.state.params, result.state.rest, held_out)
            accuracy = {"validation_accuracy": found.accuracy}
        ahead = {"look_ahead_bits": None, "routing_agreement": None, "look_ahead": {}}
        if run.model.body.looks_ahead:
            held_out = validation_batches(self.corpus, self.tokenizer, run.context, run.batch, FLAGS.eval_batches)
            found = look_ahead(make_look_ahead_step(run.model, self.tokenizer.bytes_per_token), result.state.params,
                               result.state.rest, held_out)
            ahead = {"look_ahead_bits": found.ahead.bits_per_byte, "routing_agreement": found.agreement,
                     "look_ahead": found.as_dict()}
        self.trained += 1
        spent, left = time.perf_counter() - self.began, self.total - len(self.rows) - 1
        print(f"{place}: {result.evaluation.bits_per_byte:.3f} {measure.short}; "
              f"{left} runs to go, about {spent / self.trained * left / 60:.0f} min", flush=True)
        return {
            "model": name, "seed": run.seed, "learning_rate": run.optimizer.learning_rate, "folder": str(folder),
            "steps": run.steps, "tokens": run.steps * run.batch * run.context,
            "training_flops": flops_per_token * run.steps * run.batch * run.context,
            measure.key: result.evaluation.bits_per_byte, **accuracy, **ahead,
            "train_tokens_per_second": result.tokens_per_second, "compile_seconds": result.compile_seconds,
            "first_token_seconds": speed.first_token, "decode_tokens_per_second": speed.tokens_per_second,
            "state_bytes": {str(context): state_bytes(run.model, context) for context in comparison.CONTEXTS},
            "history": result.history, "run": json.loads(run.to_json()),
        }


def main() -> None:
    import jax

    from archlab.analysis.accounts import profile
    from archlab.analysis.inside import look_inside
    from archlab.analysis.matching import active_body, match
    from archlab.data import Corpus, load_corpus, tokenizer_from
    from archlab.training.loop import Run
    from archlab.training.objectives import objective
    from archlab.training.optimizers import Optimizer
    from archlab.training.saving import load
    from archlab.zoo import list_models

    preset = PRESETS[FLAGS.preset]
    given = lambda name: preset[name] if getattr(FLAGS, name) is None else getattr(FLAGS, name)
    budget, seeds, trials = given("flops"), given("seeds"), given("lr_trials")
    for name, value in (("flops", budget), ("seeds", seeds), ("lr_trials", trials), ("batch", FLAGS.batch)):
        if value <= 0:
            raise ValueError(f"--{name} = {value}: must be positive")
    corpus = load_corpus(FLAGS.data)
    tokenizer = tokenizer_from(FLAGS.tokenizer, corpus)
    files = common.named(FLAGS.models, list_models())
    changes = FLAGS.set if isinstance(corpus, Corpus) else [f"vocab={corpus.vocab}", *FLAGS.set]
    configs = {name: common.model_config(model, changes) for name, model in files.items()}
    for name, config in configs.items():
        if (kind := objective(config)) != "next token":
            raise ValueError(f"{name} is trained on the {kind}: its loss cannot stand beside that of the next token")
    context = FLAGS.context or (256 if isinstance(corpus, Corpus) else corpus.context)
    measure = comparison.TEXT if isinstance(corpus, Corpus) else comparison.TASK
    configs = {name: config.set("vocab", max(config.vocab, tokenizer.vocab)) for name, config in configs.items()}
    if FLAGS.match == "params":
        target = active_body(next(iter(configs.values())))
        matched = {name: match(config, target) for name, config in configs.items()}
        for name in configs:
            print(f"{name}: width {configs[name].width} -> {matched[name].width} for {target:,.0f} active parameters")
        configs = matched
    profiles = {name: profile(config, context) for name, config in configs.items()}
    cost = {name: accounts.training.total for name, accounts in profiles.items()}
    tokens = FLAGS.tokens or budget / cost[next(iter(cost))]
    spend = {name: budget / cost[name] if FLAGS.match == "flops" else tokens for name in configs}
    steps = {name: round(spend[name] / (FLAGS.batch * context)) for name in configs}
    least = 2 * FLAGS.batch * context
    _check_steps(steps, f"--flops={least * max(cost.values()):.2g}" if FLAGS.match == "flops" else f"--tokens={least}")

    def run(name: str, rate: float, seed: int) -> Run:
        return Run(configs[name], steps[name], FLAGS.batch, context, FLAGS.data, FLAGS.tokenizer, seed,
                   optimizer=Optimizer(learning_rate=rate))

    rates = {name: [LEARNING_RATES.get(name, 3e-3) * 3.0 ** (i - (trials - 1) / 2) for i in range(trials)]
             for name in configs}
    trial_runs = {name: [run(name, rate, 0) for rate in rates[name]] for name in configs}  # all valid, or none begins
    for name, file in files.items():
        common.same_code(Path(FLAGS.out) / "code" / name, file)
    work, rows = Work(corpus, tokenizer, total=len(configs) * (trials + seeds - 1)), {}
    for name in configs:
        tried = [work.row(name, trial, cost[name]) for trial in trial_runs[name]]
        best = min(tried, key=lambda row: row[measure.key])
        rows[name] = [best] + [work.row(name, run(name, best["learning_rate"], seed), cost[name])
                               for seed in range(1, seeds)]

    out = Path(FLAGS.out)
    flat = lambda row: {key: value for key, value in row.items() if not isinstance(value, (dict, list))}
    comparison.write_csv(out / "runs.csv", [flat(row) for row in work.rows])
    table = comparison.summarise(rows, profiles)
    comparison.write_csv(out / "results.csv", table)
    inside = {name: look_inside(load(rows[name][0]["folder"]), corpus, tokenizer, context) for name in rows}
    best_rate = {name: row[0]["learning_rate"] for name, row in rows.items()}
    at_edge = [name for name, rate in best_rate.items() if trials > 1 and rate in (rates[name][0], rates[name][-1])]
    page = comparison.write_report(out, rows, table, inside, tokenizer, title="Architectures compared", settings={
        "preset": FLAGS.preset, "match": FLAGS.match, "corpus": FLAGS.data, "tokenizer": FLAGS.tokenizer,
        "context": context, "batch": FLAGS.batch, "seeds": seeds, "learning-rate trials": trials,
        "best rate at the edge of those tried": ", ".join(at_edge) or "none",
        "device": jax.devices()[0].device_kind})
    print("\n" + comparison.as_text(table))
    winner = min(table, key=lambda row: row[measure.key])["model"]
    print(f"\npictures: {page}\nfigures: {out / 'results.csv'}")
    if measure is comparison.TEXT:  # a task's answers need not be its next tokens: there is nothing to write on
        print(f"next: python -m experiments.generate --checkpoint={rows[winner][0]['folder']}"
              f"{common.code_flag(files[winner])} --prompt='def '")


def _check_steps(steps: dict[str, int], least: str) -> None:
    """ValueError where a model gets fewer than 2 steps; a warning where one gets more than 10 times another's. least:
    the flag that would give 2 to every model."""
    fewest, most = min(steps, key=steps.get), max(steps, key=steps.get)
    if steps[fewest] < 2:
        raise ValueError(f"{fewest}: the budget buys {steps[fewest]} step{'s' if steps[fewest] == 0 else ''}; every "
                         f"model needs at least 2, for which {least} is enough")
    if steps[most] > 10 * steps[fewest]:
        print(f"warning: {most} gets {steps[most]} steps and {fewest} only {steps[fewest]}: equal FLOPs compare these "
              "two at very different amounts of training; --match=params gives all the same", file=sys.stderr)


if __name__ == "__main__":
    common.run(main)
