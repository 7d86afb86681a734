"""The plan of a scaling study: what `--run` would do, and what it would cost here."""

import contextlib
import statistics
import time

from absl import flags

from archlab.analysis.scaling.laws import DENSE
from experiments import common, workers
from experiments.scaling_runs import Climb, Once, say

FLAGS = flags.FLAGS


def show(climbs: list[Climb], shards: int) -> None:
    """Prints what `--run` would do, and what it would cost here."""
    from rich.console import Console
    from rich.table import Table

    from archlab.analysis.accounts import count_parameters, short

    parts = shards * FLAGS.workers
    with workers.cores(0, FLAGS.workers):  # what is timed has those of one worker
        speeds = _speeds(climbs) if FLAGS.estimate else {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(("model", "size", "has", "N counted", "width", "layers", "batch", "rate", "FLOPs/token",
                                "tokens, by budget", "tokens/N", "steps", "FLOPs", "minutes", "memory")):
        table.add_column(column, justify="right" if i else "left")
    for climb in sorted(climbs, key=lambda climb: (FLAGS.models.index(_file(climb)), climb.rung.size)):
        rung, runs = climb.rung, [climb.run(budget, 1.0) for budget in climb.budgets]
        speed, memory = speeds.get(rung, (None, None))
        per = [run.tokens / rung.N["counted"] for run in runs]
        table.add_row(rung.name, short(rung.size, False), short(count_parameters(rung.model).active_body, False),
                      short(rung.N["counted"], False), str(rung.model.width), str(rung.layers),
                      f"{rung.batch} x {rung.context}", f"{rung.learning_rate:.2g}", short(rung.flops_per_token, False),
                      " ".join(short(run.tokens, False) for run in runs), f"{min(per):.1f} to {max(per):.1f}",
                      f"{runs[0].steps:,} to {runs[-1].steps:,}", f"{climb.flops:.2g}",
                      "–" if speed is None else f"{climb.flops / speed / 60:.1f}",
                      "–" if memory is None else short(memory, False) + "B")
    Console(width=200).print(table)
    for name in dict.fromkeys(climb.rung.name for climb in climbs):
        own = sum(climb.seeds * len(climb.budgets) for climb in climbs if climb.rung.name == name)
        if own < 2 * len(DENSE.names):
            print(f"{name}: {own} runs are few for a law of {len(DENSE.names)} coefficients: add --sizes or --budgets, "
                  "or widen --window")
    runs = sum(climb.seeds * len(climb.budgets) for climb in climbs)
    trials = sum(len(climb.rates) - (climb.trial in climb.budgets) for climb in climbs
                 if len(climb.rates) > 1)  # the best one's may be a run as well
    print(f"\n{runs} runs and {trials} more to try learning rates, {sum(c.flops for c in climbs):.3g} FLOPs, in "
          f"{parts} part{'s' if parts > 1 else ''}")
    if speeds:
        hours = [[0.0] * FLAGS.workers for _ in range(shards)]
        for i, climb in enumerate(climbs):  # the dearest first: who is free takes the next of its shard
            own = hours[i % shards]
            own[own.index(min(own))] += climb.flops / speeds[climb.rung][0] / 3600
        cores = f", each worker on {1 / FLAGS.workers:.0%} of its cores" if FLAGS.workers > 1 else ""
        print(f"about {max(map(max, hours)):.2g} hours on this machine{cores}, as a few steps of the smallest and the "
              "largest sizes went just now; compilation and evaluation come on top")
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
    import jax

    from archlab.analysis.collectives import memory
    from archlab.data import train_batches
    from archlab.parallel.mesh import global_batch

    rung, run = climb.rung, climb.run(climb.budgets[0], 1.0)
    say(f"timing a few steps of {rung.name} at {rung.size:,.0f} parameters")
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
    return rung.flops_per_token * run.batch * run.context / statistics.median(seconds[1:]), memory(programs.compiled)


def _file(climb: Climb) -> str:
    return next(file for file in FLAGS.models if common.name_of(file) == climb.rung.name)
