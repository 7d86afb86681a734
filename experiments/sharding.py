"""Measures meshes: what a training step sends between devices, what it holds on each, and how long it takes.

    python -m experiments.sharding --model=mixture-of-experts-tiny --devices=8
    python -m experiments.sharding --model=transformer-small --devices=8 --meshes="data:8 fsdp:8 data:2,tensor:4"

Collectives are read from the compiled program: how often each kind runs, and the bytes that one device sends in a step,
by the rules of `archlab.analysis.collectives`. Loops count as often as they turn. What stands in a branch (further
rounds of an all-to-all, which run only while a device has more to send) is apart, under `maybe_MB`, once for each turn
of the loops around it. Memory is of the program on one device: arguments, results and temporaries, what is aliased
once. Time is the median of whole steps (forward, backward, AdamW) after the first.

With --devices the CPU pretends to be so many; else all real devices are used. Pretended ones share the cores and send
through memory, so times compare programs, not networks; and each platform's compiler has collectives of its own (the
CPU's adds up gradients by all-reduce where weights are split, too). Prints a table and writes sharding.csv and .md.

Some ten seconds a mesh for a tiny model on four CPU cores. Expected there for mixture-of-experts-tiny: data:8 sends
each gradient (all-reduce), fsdp:8 holds least and gathers weights besides, and meshes with an expert axis send least:
experts' weights stay where they are, tokens travel, by all-to-all among eight devices and gathered among fewer.
"""

import csv
import statistics
import sys
import time
from pathlib import Path

from absl import flags

from experiments import common

FLAGS = flags.FLAGS
MESHES = ["data:8", "fsdp:8", "expert:8", "data:2,expert:4", "fsdp:2,expert:4", "data:2,expert:2,tensor:2"]
flags.DEFINE_string("model", "mixture-of-experts-tiny", "A name of the zoo, or a Python file of yours with a CONFIG.")
flags.DEFINE_multi_string("set", [], "path=value: changes a field of the model's config. Repeatable.")
flags.DEFINE_string("dtype", None, "Compute dtype: bfloat16 or float32.")
flags.DEFINE_spaceseplist("meshes", MESHES, "Meshes with spaces between, each as --mesh of experiments.train has it.")
flags.DEFINE_integer("devices", None, "CPU devices to pretend to have; by default the real ones.")
flags.DEFINE_integer("batch", 16, "Rows of a step, over all devices.")
flags.DEFINE_integer("context", 128, "Tokens a row.")
flags.DEFINE_integer("steps", 5, "Steps behind each median.")
flags.DEFINE_string("out", "runs/sharding", "Folder of the tables.")


def main() -> None:
    import jax
    from rich.console import Console
    from rich.table import Table

    from archlab.analysis.collectives import KINDS
    from archlab.parallel.mesh import make_mesh

    numbers = {name: getattr(FLAGS, name) for name in ("devices", "batch", "context", "steps")}
    if wrong := [name for name, number in numbers.items() if number is not None and number < 1]:
        raise ValueError(f"--{wrong[0]}={numbers[wrong[0]]}: must be at least 1")
    if FLAGS.devices:  # before anything touches a device
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    config = common.model_config(FLAGS.model, FLAGS.set, FLAGS.dtype)
    rows = []
    for spec, mesh in [(spec, make_mesh(spec)) for spec in FLAGS.meshes]:
        rows.append({"mesh": spec} | measure(config, mesh))
        print(f"{spec}: {rows[-1]['step_ms']:,.0f} ms a step", file=sys.stderr)

    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    title = f"{FLAGS.model}, {FLAGS.batch} x {FLAGS.context} tokens, {devices}"
    kinds = [kind for kind in KINDS if any(row[kind] for row in rows)]
    figures = ["sent_MB", "maybe_MB", "memory_MB", "step_ms"]
    columns = ["mesh", *(f"{kind} (times: MB)" for kind in kinds), *(figure.replace("_", " ") for figure in figures)]
    cells = [[row["mesh"], *(f"{row[kind]:,}: {row[kind + '_MB']:,.2f}" if row[kind] else "" for kind in kinds),
              *(f"{row[figure]:,.2f}" for figure in figures)] for row in rows]
    folder = Path(FLAGS.out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sharding.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *cells]
    (folder / "sharding.md").write_text(f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    table = Table(box=None, header_style="bold", title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for line in cells:
        table.add_row(*line)
    Console(width=200).print(table)
    print(f"{folder}/sharding.csv, {folder}/sharding.md")


def measure(config, mesh) -> dict:
    """Of one training step on a mesh: how often each kind of collective runs and the MB it sends, memory, and time."""
    import jax
    import numpy as np

    from archlab.analysis.collectives import KINDS, collectives, memory
    from archlab.data import Batch
    from archlab.parallel.mesh import global_batch
    from archlab.training.optimizers import Optimizer
    from archlab.training.step import create_state, make_train_step, parameters

    shape = FLAGS.batch, FLAGS.context
    ids = np.random.default_rng(0).integers(0, config.vocab, shape, dtype=np.int32)
    ones = np.ones(shape, np.int32)
    batch = global_batch(Batch(ids, np.roll(ids, -1, 1), ones, ones.astype(np.float32)), mesh)
    transform = Optimizer().build(parameters(config))
    with jax.set_mesh(mesh):
        structure, state, shardings = create_state(config, transform, 0, mesh)
        step = make_train_step(structure, transform, np.ones(config.vocab, np.int32), shardings=shardings)
        program = step.lower(state, batch, 1e-3).compile()
        seconds = []
        for _ in range(FLAGS.steps + 1):
            began = time.perf_counter()
            state, metrics = program(state, batch, 1e-3)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - began)
    found = collectives(program)
    row = {}
    for kind in KINDS:
        sure = [c for c in found if c.kind == kind and c.certain]
        row |= {kind: sum(c.times for c in sure), f"{kind}_MB": sum(c.bytes for c in sure) / 1e6}
    total, certain = (sum(c.bytes for c in found if c.certain >= bound) for bound in (False, True))
    return row | {"sent_MB": certain / 1e6, "maybe_MB": (total - certain) / 1e6, "memory_MB": memory(program) / 1e6,
                  "step_ms": statistics.median(seconds[1:]) * 1e3}


if __name__ == "__main__":
    common.run(main)
