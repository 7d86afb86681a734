"""Measures forms of attention over the length of the text: time and memory, forward and backward.

    python -m experiments.attention
    python -m experiments.attention --lengths=1024,4096,16384 --forms=full,window,jax

One layer with 4 heads of 64 at batch 1, its projections included. `jax` is the same layer by
`jax.nn.dot_product_attention`, in the same run, up to --jax_longest (it keeps all T x T scores). Memory is what the
compiled program holds beside its arguments and results. Prints a table and writes attention.csv and attention.png.

About ten minutes on four CPU cores. Expected: `full` grows as T^2 in time and about linearly in memory; window,
Longformer, BigBird, Performer and linear attention grow linearly in both.
"""

import csv
import statistics
import sys
import time
from pathlib import Path

from absl import flags

from experiments import common

FLAGS = flags.FLAGS
flags.DEFINE_list("forms", ["full", "jax", "window", "longformer", "bigbird", "linformer", "linear", "performer"],
                  "Which to measure.")
flags.DEFINE_list("lengths", ["1024", "2048", "4096", "8192", "16384", "32768"], "T.")
flags.DEFINE_integer("backward_longest", 8192, "Up to this T the backward pass of full attention is measured too.")
flags.DEFINE_integer("jax_longest", 8192, "Up to this T jax.nn.dot_product_attention is measured.")
flags.DEFINE_integer("repeats", 3, "Runs behind each median.")
flags.DEFINE_string("out", "runs/attention", "Folder of the table and the picture.")

HEADS, SIZE, WINDOW = 4, 64, 256


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    from archlab.analysis import plots

    lengths = [int(length) for length in FLAGS.lengths]
    if unknown := set(FLAGS.forms) - set(forms()):
        raise ValueError(f"--forms={','.join(sorted(unknown))}: there are {', '.join(forms())}")
    rows = []
    for name in FLAGS.forms:
        for length in lengths:
            if name == "jax" and length > FLAGS.jax_longest:
                continue
            backward = name not in ("full", "jax") or length <= FLAGS.backward_longest
            rows.append(measure(name, length, backward))
            print(f"{name} at {length:,}: {rows[-1]['forward_ms']:,.1f} ms", file=sys.stderr)
    folder = Path(FLAGS.out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "attention.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    names = list(dict.fromkeys(row["form"] for row in rows))
    column = lambda name, key: [row[key] for row in rows if row["form"] == name]
    series = {name: [(column(name, "T"), column(name, "forward_ms"))] for name in names}
    plots.save(plots.lines(series, plots.palette(names), "Forward pass of one layer", "tokens", "ms", log="xy"),
               folder / "attention.png")
    table = Table(box=None, header_style="bold", title=f"{HEADS} heads of {SIZE}, batch 1, float32")
    for i, column in enumerate(rows[0]):
        table.add_column(column.replace("_", " "), justify="right" if i else "left")
    for row in rows:
        table.add_row(row["form"], f"{row['T']:,}", *("" if v is None else f"{v:,.1f}" for v in list(row.values())[2:]))
    Console(width=160).print(table)
    print(f"{folder}/attention.csv, {folder}/attention.png")


def forms() -> dict:
    """Name -> the config of a layer; `jax` is `Attention` with the core of `jax.nn`."""
    from archlab.attention.attention import Attention
    from archlab.attention.linear import LinearAttention
    from archlab.attention.linformer import CausalLinformer
    from archlab.attention.performer import Performer
    from archlab.attention.sparse import BigBird, Longformer

    return {"full": Attention(HEADS), "jax": Attention(HEADS), "window": Attention(HEADS, window=WINDOW),
            "longformer": Longformer(HEADS, window=WINDOW), "bigbird": BigBird(HEADS),
            "linformer": CausalLinformer(HEADS), "linear": LinearAttention(HEADS), "performer": Performer(HEADS)}


def layer(name: str):
    """A function of the stream [1, T, D] and its `Tokens`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from archlab.layers.alphabet import project
    from archlab.layers.contract import Place

    module = forms()[name].build(nnx.Rngs(0), Place(HEADS * SIZE))

    def with_jax(x, tokens):
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in module.heads(x, tokens))
        return project(jax.nn.dot_product_attention(q, k, v, is_causal=True), module.out, "BTHK,HKD->BTD")

    return with_jax if name == "jax" else lambda x, tokens: module(x, tokens)[0]


def measure(name: str, length: int, backward: bool) -> dict:
    """Medians in ms, and in MB what the compiled program holds beside its arguments and results."""
    import jax
    import jax.numpy as jnp

    from archlab.layers.contract import Tokens

    x = jax.random.normal(jax.random.key(0), (1, length, HEADS * SIZE))
    tokens = Tokens(jnp.ones((1, length), jnp.int32), jnp.arange(length, dtype=jnp.int32)[None])
    run, row = layer(name), {"form": name, "T": length}
    passes = {"forward": run}
    if backward:
        passes["backward"] = jax.grad(lambda x, tokens: (run(x, tokens) ** 2).sum())
    for what in ("forward", "backward"):
        if what not in passes:
            row |= {f"{what}_ms": None, f"{what}_MB": None}
            continue
        compiled = jax.jit(passes[what]).lower(x, tokens).compile()
        seconds = []
        for _ in range(FLAGS.repeats + 1):
            began = time.perf_counter()
            jax.block_until_ready(compiled(x, tokens))
            seconds.append(time.perf_counter() - began)
        row |= {f"{what}_ms": 1e3 * statistics.median(seconds[1:]),
                f"{what}_MB": compiled.memory_analysis().temp_size_in_bytes / 1e6}
    return row


if __name__ == "__main__":
    common.run(main)
