"""Measures the forms of every recurrence: time and memory, forward and backward, against its own steps one by one.

    python -m experiments.recurrence
    python -m experiments.recurrence --recurrences=scalar_decay --form="Chunked(32)" --form="Chunked(64)" --lengths=8192

Forms are expressions of archlab.recurrence.forms; `chosen` is what the platform gets when nobody asks, `Sequential()`
the definition. Forms take turns, so that all meet the same moods of the machine: compare within a length. Memory is
what the compiled program holds beside its arguments and results. Prints a table and writes recurrence.csv.

About four minutes on four CPU cores. Expected there, forward and backward at 2,048 tokens: scalar decays 8 times as
fast in chunks as step by step, decays of each channel and delta rules 3 times; diagonal recurrences, which no product
of matrices computes, as fast, in a tenth of the memory.
"""

import csv
import statistics
import sys
import time
from pathlib import Path

from absl import flags

from experiments import common

FLAGS = flags.FLAGS
flags.DEFINE_list("recurrences", ["scalar_decay", "channel_decay", "delta_rule", "generalised_delta", "selective_scan",
                                    "diagonal", "complex"],
                  "Which to measure.")
flags.DEFINE_multi_string("form", [], "One more form, as an expression: Chunked(32). Repeatable.")
flags.DEFINE_list("lengths", ["2048"], "T.")
flags.DEFINE_integer("batch", 2, "B.")
flags.DEFINE_integer("heads", 8, "H; diagonal recurrences have H * P channels.")
flags.DEFINE_integer("groups", 8, "G: groups of heads that share queries and keys, of scalar decays and delta rules.")
flags.DEFINE_integer("keys", 64, "N; 16 for the selective scan.")
flags.DEFINE_integer("values", 64, "P.")
flags.DEFINE_integer("repeats", 5, "Runs behind each median.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the arguments; states are float32.")
flags.DEFINE_string("out", "runs/recurrence", "Folder of the table.")


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    if unknown := set(FLAGS.recurrences) - set(recurrences()):
        raise ValueError(f"--recurrences={','.join(sorted(unknown))}: there are {', '.join(recurrences())}")
    rows = []
    for name in FLAGS.recurrences:
        for length in map(int, FLAGS.lengths):
            rows += measure(name, length)
            print(f"{name} at {length:,}: {rows[-1]['both_ms']:,.1f} ms", file=sys.stderr)
    folder = Path(FLAGS.out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "recurrence.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    shape = f"B {FLAGS.batch}, H {FLAGS.heads}, G {FLAGS.groups}, N {FLAGS.keys}, P {FLAGS.values}, {FLAGS.dtype}"
    table = Table(box=None, header_style="bold", title=shape)
    for i, column in enumerate(rows[0]):
        table.add_column(column.replace("_", " "), justify="right" if i > 1 else "left")
    for row in rows:
        name, form, T, *numbers = row.values()
        table.add_row(name, form, f"{T:,}", *(f"{v:,.2f}" if v < 10 else f"{v:,.0f}" for v in numbers))
    Console(width=160).print(table)
    print(f"{folder}/recurrence.csv")


def recurrences() -> dict:
    """Name -> a function of a length that gives the primitive, its arrays, and its state before them."""
    import jax
    import jax.numpy as jnp

    from archlab.layers.contract import Tokens, document_starts
    from archlab.recurrence.channel_decay import channel_decay
    from archlab.recurrence.delta_rule import delta_rule
    from archlab.recurrence.diagonal import DiagonalState, diagonal
    from archlab.recurrence.generalised_delta import generalised_delta
    from archlab.recurrence.memory import MemoryState
    from archlab.recurrence.scalar_decay import scalar_decay
    from archlab.recurrence.selective_scan import selective_scan

    B, H, G, N, P = FLAGS.batch, FLAGS.heads, FLAGS.groups, FLAGS.keys, FLAGS.values
    seeds = iter(range(1000))
    normal = lambda *shape: jax.random.normal(jax.random.key(next(seeds)), shape, FLAGS.dtype)
    unit = lambda a: a / jnp.linalg.norm(a, axis=-1, keepdims=True)
    decay = lambda *shape: -0.1 * jax.nn.softplus(normal(*shape))
    tokens = lambda T: Tokens(jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1)))

    def memory(rule, *arrays, shared=False):
        def run(T):
            groups = G if shared else H
            first = unit(normal(B, groups, T, N)), unit(normal(B, groups, T, N)), normal(B, H, T, P)
            state = MemoryState.zeros(B, H, N, P, jnp.float32)
            return (lambda form, *a: rule(*a, tokens(T), state, form=form)[0]), first + tuple(a(T) for a in arrays)
        return run

    head, key = lambda T: decay(B, H, T), lambda T: decay(B, H, T, N)
    direction = lambda T: unit(normal(B, H, T, N))

    def selective(T):
        F, n = H * P, 16
        x, dt, A = normal(B, T, F), jax.nn.softplus(normal(B, T, F)), -jnp.exp(normal(F, n))
        arrays = x, dt, A, normal(B, T, n), normal(B, T, n)
        starts, h = document_starts(tokens(T).segments, jnp.zeros(B, jnp.int32))[0], jnp.zeros((B, F, n))
        return (lambda form, *a: selective_scan(*a, starts, h, form=form)[0]), arrays

    def channels(dtype):
        def run(T):
            state = DiagonalState.zeros(B, H * P, dtype)
            turn = jnp.exp(1j * normal(B, T, H * P)) if dtype == jnp.complex64 else 1
            arrays = jnp.exp(decay(B, T, H * P)) * turn, normal(B, T, H * P).astype(dtype)
            return (lambda form, *a: jnp.abs(diagonal(*a, tokens(T), state, form)[0])), arrays
        return run

    return {"scalar_decay": memory(scalar_decay, head, shared=True), "channel_decay": memory(channel_decay, key),
            "delta_rule": memory(delta_rule, lambda T: jax.nn.sigmoid(normal(B, H, T)), head, shared=True),
            "generalised_delta": memory(generalised_delta, direction, lambda T: -0.5 * direction(T), key),
            "selective_scan": selective, "diagonal": channels(jnp.float32), "complex": channels(jnp.complex64)}


def measure(name: str, length: int) -> list[dict]:
    """A row for each form: medians in ms, how many times as fast as step by step, and MB."""
    import jax
    import jax.numpy as jnp

    from archlab.recurrence.forms import Sequential
    from archlab.recurrence.mamba2 import Mamba2

    run, arrays = recurrences()[name](length)
    wanted = {"Sequential()": Sequential(), "chosen": None}
    wanted |= {text: Mamba2().set("form", text).form for text in FLAGS.form}
    rows, programs = [], {}
    for text, form in wanted.items():
        forward = jax.jit(lambda *a, form=form: run(form, *a))
        loss = lambda *a, form=form: (run(form, *a).astype(jnp.float32) ** 2).sum()
        both = jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays)))))
        programs[text] = [f.lower(*arrays).compile() for f in (forward, both)]
    seconds = {text: ([], []) for text in programs}
    for _ in range(FLAGS.repeats + 1):
        for text, pair in programs.items():
            for program, taken in zip(pair, seconds[text]):
                jax.block_until_ready(program(*arrays))  # what the form before it left in caches and in malloc is its
                began = time.perf_counter()
                jax.block_until_ready(program(*arrays))
                taken.append(time.perf_counter() - began)
    for text, pair in programs.items():
        forward, both = (1e3 * statistics.median(taken[1:]) for taken in seconds[text])
        MB = [program.memory_analysis().temp_size_in_bytes / 1e6 for program in pair]
        rows.append({"recurrence": name, "form": text, "T": length, "forward_ms": forward, "both_ms": both,
                     "forward_MB": MB[0], "both_MB": MB[1]})
    for row in rows:
        row["times_as_fast"] = rows[0]["both_ms"] / row["both_ms"]
    return rows


if __name__ == "__main__":
    common.run(main)
