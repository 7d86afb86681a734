"""Trains a tiny model with each kind of positions on short texts and reads longer ones with it.

    python -m experiments.extrapolate --out=runs/extrapolate

One model per kind is trained at 256 tokens: none (NoPE), learned, sinusoidal, rope, xpos, alibi, t5. The scalings of
RoPE are not trained: linear, ntk, dynamic and yarn are the weights of `rope` under another config. Linear, ntk and yarn
have the factor 16 at every length; dynamic, with the usual factor of 2, goes by the length of the text. Learned
positions have 4096 rows, of which training meets 256: the others are as they were drawn. All read the same text in the
same order, one seed each.

Prints bits per byte by length of the text, and by place in the longest; leaves results.csv, four figures and each run's
folder under --out. Called again it trains only what is missing.

Expected (Press et al. 2021, arXiv:2108.12409, section 2.2; Peng et al. 2023, arXiv:2309.00071): at 256 tokens all that
were trained are close, `none` a little behind. On longer texts alibi holds, as far as we look. Learned, sinusoidal and
plain rope break at once; t5 and xpos fall behind more slowly. Without any training at its length yarn holds what rope
loses up to 16 times the length, ntk up to about a quarter of its factor, and dynamic does so at no loss on short texts;
linear is of no use before it is trained further.
Cost: seven trainings of 2.9 M bytes (0.6 M parameters) and eleven readings of 0.3 M. With --preset=quick (300 steps)
one training took one to three minutes on four CPU cores that did much else; docs/extrapolation.md has what came of it.
"""

import dataclasses
import math
from pathlib import Path

from absl import flags

from archlab.layers.config import near
from experiments import common


@dataclasses.dataclass(frozen=True)
class Preset:
    """A budget: the model's sizes, its training, and the texts it is tried on. rows: of each step; tokens: read at
    each length of text."""

    width: int
    depth: int
    heads: int
    steps: int
    rows: int
    context: int
    longest: int
    tokens: int

    @property
    def lengths(self) -> list[int]:
        """Lengths of text: from the trained one, each twice the one before."""
        return [self.context * 2**i for i in range(int(math.log2(self.longest / self.context)) + 1)]


PRESETS = {"standard": Preset(128, 3, 4, steps=700, rows=16, context=256, longest=4096, tokens=2**16),
           "quick": Preset(128, 3, 4, steps=300, rows=16, context=256, longest=4096, tokens=2**15),
           "smoke": Preset(16, 1, 2, steps=4, rows=2, context=16, longest=64, tokens=2**9)}
SCALINGS = ("linear", "ntk", "dynamic", "yarn")  # of rope, with its weights
METHODS = ("none", "learned", "sinusoidal", "rope", *SCALINGS, "xpos", "alibi", "t5")

FLAGS = flags.FLAGS
flags.DEFINE_list("methods", list(METHODS), f"Some of {', '.join(METHODS)}.")
flags.DEFINE_enum("preset", "standard", list(PRESETS),
                  "standard: as above; quick: fewer steps; smoke: a minute, to see that it runs.")
flags.DEFINE_string("data", "stdlib", "The corpus: stdlib, text:GLOB or tfds:NAME[/CONFIG]. Tokens are bytes.")
flags.DEFINE_string("out", "runs/extrapolate", "The folder of the experiment.")


def model(method: str, preset: Preset):
    """The config of a method: a small Transformer that differs from the others in its positions alone."""
    from archlab.attention.attention import Attention
    from archlab.attention.positions import ALiBi, RelativePositions, Rotary, XPos
    from archlab.attention.relative import RelativeBias
    from archlab.attention.scaling import DynamicNTK, LinearScaling, NTKScaling, YaRN
    from archlab.layers.mlp import SwiGLU
    from archlab.layers.positions import LearnedPositions, SinusoidalPositions
    from archlab.layers.repeat import Repeat
    from archlab.layers.residual import Residual
    from archlab.layers.sequence import Sequence
    from archlab.model import LanguageModel

    factor = preset.longest / preset.context
    positions = {
        "rope": Rotary(), "xpos": XPos(), "alibi": ALiBi(), "t5": RelativePositions(),
        "linear": Rotary(scaling=LinearScaling(factor)), "ntk": Rotary(scaling=NTKScaling(factor)),
        "dynamic": Rotary(scaling=DynamicNTK(2.0, original=preset.context)),
        "yarn": Rotary(scaling=YaRN(factor, original=preset.context)),
    }
    before = {"learned": [LearnedPositions(preset.longest)], "t5": [RelativeBias(preset.heads)],
              "sinusoidal": [SinusoidalPositions(scale=preset.width**-0.5)]}
    block = Sequence(Residual(Attention(preset.heads, positions=positions.get(method))),
                     Residual(SwiGLU(preset.width * 8 // 3)))
    return LanguageModel(256, preset.width, Sequence(*before.get(method, []), Repeat(block, preset.depth)))


def read(config, params, rest, preset: Preset, corpus, tokenizer) -> list[dict]:
    """Bits per byte of `config` with the given weights, for each length of text: of all places, and of each range of
    places that is twice as far as the last."""
    import jax
    from flax import nnx

    from archlab.data import validation_batches
    from archlab.layers.weights import split
    from archlab.training.evaluation import evaluate, make_evaluate_step

    structure, _, _ = split(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))
    step, rows = make_evaluate_step(structure, tokenizer.bytes_per_token), []
    for length in preset.lengths:
        texts = min(preset.rows, preset.tokens // length)
        batches = validation_batches(corpus, tokenizer, length, texts, preset.tokens // length // texts)
        found = evaluate(step, params, rest, batches)
        rows.append({"context": length, "places": "all", "bits_per_byte": found.bits_per_byte})
        edges = [0] + [n for n in preset.lengths if n <= length]
        for first, end in zip(edges, edges[1:]):
            bits = found.nats[first:end].sum() / found.targets[first:end].sum() / math.log(2)
            rows.append({"context": length, "places": f"{first}-{end - 1}", "bits_per_byte": bits})
    jax.clear_caches()  # programs for every length: gigabytes by the end
    return rows


def table(rows: list[dict], keys: list, of, head: str) -> str:
    """Bits per byte by method and key, `of(row)` being a row's key, lowest at the end first."""
    cells = {}
    for row in rows:
        cells.setdefault(row["method"], {})[of(row)] = row["bits_per_byte"]
    lines = [f"{head:<24}" + "".join(f"{key!s:>11}" for key in keys)]
    for method in sorted(cells, key=lambda name: cells[name][keys[-1]]):
        lines.append(f"{method:<24}" + "".join(f"{cells[method][key]:>11.3f}" for key in keys))
    return "\n".join(lines)


def draw(out: Path, rows: list[dict], preset: Preset) -> None:
    """Two figures for the methods that were trained and two for rope and its scalings: by length, and by place."""
    from archlab.analysis import plots

    methods = list(dict.fromkeys(row["method"] for row in rows))
    groups = {"trained": [m for m in methods if m not in SCALINGS],
              "rope": [m for m in methods if m == "rope" or m in SCALINGS]}
    for group, names in groups.items():
        by_length, by_place = {}, {}
        for name in names:
            mine = [row for row in rows if row["method"] == name]
            whole = [row for row in mine if row["places"] == "all"]
            ranges = [row for row in mine if row["context"] == preset.longest and row["places"] != "all"]
            bits = lambda chosen: [row["bits_per_byte"] for row in chosen]
            by_length[name] = [([row["context"] for row in whole], bits(whole))]
            by_place[name] = [([int(row["places"].split("-")[1]) + 1 for row in ranges], bits(ranges))]
        if not names:
            continue
        kind = "Trained" if group == "trained" else "RoPE's scalings, trained"
        for file, series, x in (("length", by_length, "tokens of text"),
                                ("place", by_place, f"place in texts of {preset.longest} tokens, up to")):
            figure = plots.lines(series, plots.palette(names), f"{kind} at {preset.context} tokens", x,
                                 "validation bits per byte", log="x", settle=0)
            plots.save(figure, out / f"{group}_by_{file}.png")


def main() -> None:
    from archlab.analysis.comparison import write_csv
    from archlab.data import load_corpus, tokenizer_from
    from archlab.layers.weights import split
    from archlab.training.loop import Run, train

    unknown = [method for method in FLAGS.methods if method not in METHODS]
    if unknown:
        raise ValueError(f"--methods has {unknown[0]!r}: {near(unknown[0], METHODS)}")
    if not FLAGS.methods:
        raise ValueError(f"--methods is empty: give some of {', '.join(METHODS)}")
    preset, out = PRESETS[FLAGS.preset], Path(FLAGS.out)
    corpus, tokenizer = load_corpus(FLAGS.data), tokenizer_from("bytes", None)
    trained, rows = {}, []
    for method in FLAGS.methods:
        source = "rope" if method in SCALINGS else method
        if source not in trained:
            run = Run(model(source, preset), preset.steps, preset.rows, preset.context, FLAGS.data)
            result = train(run, corpus, tokenizer, out=out / "runs" / source, name=source, eval_batches=4,
                           checkpoint_every=max(1, preset.steps // 4), tensorboard=False)
            trained[source] = split(result.model)[1:]
        found = read(model(method, preset), *trained[source], preset, corpus, tokenizer)
        rows += [{"method": method, "weights": source, **row} for row in found]
        print(f"{method}: " + ", ".join(f"{row['bits_per_byte']:.3f} at {row['context']}" for row in found
                                        if row["places"] == "all"), flush=True)
    write_csv(out / "results.csv", rows)
    draw(out, rows, preset)
    whole = [row for row in rows if row["places"] == "all"]
    longest = [row for row in rows if row["context"] == preset.longest and row["places"] != "all"]
    print("\n" + table(whole, preset.lengths, lambda row: row["context"], "bits per byte at length"))
    places = list(dict.fromkeys(row["places"] for row in longest))
    print("\n" + table(longest, places, lambda row: row["places"], f"by place, {preset.longest} tokens"))
    print(f"\nfigures: {out}/*.png\nevery number: {out / 'results.csv'}")


if __name__ == "__main__":
    common.run(main)
