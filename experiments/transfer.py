"""Does a learning rate that was tuned on a small model fit a wider or deeper one? Measured for any architecture.

    python -m experiments.transfer --out=runs/transfer
    python -m experiments.transfer --models=mamba-tiny --parts=coordinates,width --out=runs/mamba

Each model is resized: the smallest is the base, and others are trained as they are ("standard") and with what
`training/transfer.py` makes of them ("transfer", and over depth also "half": depth_power=0.5).

coordinates  after a few steps, how far embedding, stream, branches and logits have moved, by width: flat is right.
width        validation loss by learning rate, for each width: with transfer the best rate stays where it is.
depth        the same by depth, at one width (of the first model alone).

Prints the best rates and by how many doublings they move for each doubling of the size; leaves coordinates.csv,
sweep.csv, figures and index.html under --out. Called again with more it trains only what is missing.

Expected (Yang et al. 2022, arXiv:2203.03466, figures 1 and 5; Dey et al. 2025, arXiv:2505.01618, figure 2): standard,
the stream moves further the wider the model and the best rate falls, by about half a doubling or more for each doubling
of the width; with transfer both stay. Over depth the same, less sharply, our initialisation being made for depth.
docs/transfer.md has what came of it. Cost: --preset=smoke a minute of four free cores; cpu some 40 minutes of four
busy ones, of which --models=transformer-tiny --parts=coordinates,width is ten; standard, with models of width 1024, is
for an accelerator.
"""

import csv
import dataclasses
import itertools
import math
from pathlib import Path

from absl import flags

from experiments import common


@dataclasses.dataclass(frozen=True)
class Preset:
    """widths: of coordinates and sweeps. depths: copies of the block, at `width`. depth: of what is not swept over
    depth. rates: powers of two. moves: steps of the coordinate check, at a rate of 2^-8. models: by default."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    width: int
    depth: int
    rates: tuple[int, ...]
    steps: int
    rows: int
    context: int
    moves: int = 5
    models: tuple[str, ...] = ("transformer-tiny", "mamba-tiny", "mixture-of-experts-tiny")


PRESETS = {
    "smoke": Preset((16, 32), (1, 2), 16, 1, (-9, -7), steps=4, rows=2, context=16, moves=2,
                    models=("transformer-tiny",)),
    "cpu": Preset((32, 64, 128, 256), (2, 4, 8, 16), 64, 2, tuple(range(-11, -2)), steps=100, rows=16, context=64),
    "standard": Preset((64, 128, 256, 512, 1024), (2, 4, 8, 16, 32), 256, 4, tuple(range(-13, -4)), steps=1000, rows=64,
                       context=256),
}
PARTS = ("coordinates", "width", "depth")
ARMS = {"standard": None, "transfer": 1.0, "half": 0.5}  # the power of depth

FLAGS = flags.FLAGS
flags.DEFINE_list("models", [], "Names of the zoo, or Python files with a CONFIG, whose sizes are changed. By default "
                  "transformer-tiny, and but for smoke mamba-tiny and mixture-of-experts-tiny.")
flags.DEFINE_enum("preset", "cpu", list(PRESETS), "How large and how long; see above.")
flags.DEFINE_list("parts", list(PARTS), f"Some of {', '.join(PARTS)}.")
flags.DEFINE_string("optimizer", "adamw", "adamw, muon or adafactor.")
flags.DEFINE_integer("largest", None, "Leave out wider models than this.")
flags.DEFINE_string("data", "stdlib", "The corpus, as in experiments.train. Tokens are bytes.")
flags.DEFINE_string("out", "runs/transfer", "The folder of the experiment.")


def main() -> None:
    from archlab.analysis.transfer_page import best, drifts, write_page
    from archlab.data import load_corpus, tokenizer_from

    if unknown := set(FLAGS.parts) - set(PARTS):
        raise ValueError(f"--parts={','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    preset, out = PRESETS[FLAGS.preset], Path(FLAGS.out)
    widths = tuple(w for w in preset.widths if w <= (FLAGS.largest or w))
    models = common.named(FLAGS.models or preset.models, ())
    models = {name: common.model_config(model, []) for name, model in models.items()}
    data = load_corpus(FLAGS.data)
    data = data, tokenizer_from("bytes", data)
    out.mkdir(parents=True, exist_ok=True)
    checks, runs = Table(out / "coordinates.csv"), Table(out / "sweep.csv")
    about = {"optimizer": FLAGS.optimizer, "data": FLAGS.data, "preset": FLAGS.preset}
    for name, config in models.items():
        sized = {width: resized(config, width, preset.depth) for width in widths}
        if "coordinates" in FLAGS.parts:
            coordinates(checks, {"model": name} | about, sized, preset, data)
        if "width" in FLAGS.parts:
            sweep(runs, {"model": name, "axis": "width"} | about, sized, ("standard", "transfer"), preset, data)
    if "depth" in FLAGS.parts:
        name, config = next(iter(models.items()))
        sized = {depth: resized(config, preset.width, depth) for depth in preset.depths}
        sweep(runs, {"model": name, "axis": "depth"} | about, sized, tuple(ARMS), preset, data)
    checks, runs = ([row for row in table.rows if row.items() >= about.items()] for table in (checks, runs))
    for key, found in best(runs).items():
        print(*key, "best rate " + ", ".join(f"{size}: {rate:.2g}" for size, (rate, _) in found.items()))
    for key, drift in drifts(runs).items():
        print(*key, f"best rate moves by {drift:+.2f} doublings for each doubling")
    about |= {"steps": preset.steps, "tokens a step": preset.rows * preset.context}
    print("page:", write_page(out, checks, runs, about))


class Table:
    """Rows of a CSV file, written as they come."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        if path.is_file():
            with path.open(newline="") as file:
                self.rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]

    def has(self, row: dict) -> bool:
        """Whether there is a row that says the same, and more."""
        return any(row.items() <= known.items() for known in self.rows)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


def _number(text: str):
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def resized(config, width: int, depth: int):
    from archlab.analysis.scaling.ladder import resize

    return resize(config, width, depth)


def arm_of(arm: str, config, base, **optimizer):
    """(model, optimizer) of a way to choose the multipliers."""
    from archlab.training.optimizers import Optimizer
    from archlab.training.transfer import transfer

    if ARMS[arm] is None:
        return config, Optimizer(FLAGS.optimizer, **optimizer)
    return transfer(config, base, ARMS[arm]), Optimizer(FLAGS.optimizer, base=base, **optimizer)


def batches(data, preset: Preset, count: int):
    """The first batches of the training side: the same for every run."""
    from archlab.data import train_batches

    return list(itertools.islice(train_batches(*data, preset.context, preset.rows, seed=0), count))


def coordinates(table: Table, about: dict, sized: dict, preset: Preset, data) -> None:
    """Adds a row for each arm, width and station, before the first step and behind each."""
    import jax
    import numpy as np

    from archlab.analysis.stations import sizes, stations
    from archlab.layers.weights import merge
    from archlab.training.step import make_create, make_train_step, parameters

    texts, base = batches(data, preset, preset.moves + 1), next(iter(sized.values()))
    for arm, (width, config) in itertools.product(("standard", "transfer"), sized.items()):
        place = about | {"arm": arm, "width": width}
        if table.has(place):
            continue
        model, optimizer = arm_of(arm, config, base)
        transform = optimizer.build(parameters(model))
        structure, create, _ = make_create(model, transform)
        train, state = make_train_step(structure, transform, np.ones(model.vocab, np.int32)), create(0)
        look = jax.jit(lambda params, rest, ids, structure=structure: stations(merge(structure, params, rest), ids))
        first = None
        for step in range(preset.moves + 1):
            seen = look(state.params, state.rest, texts[-1].ids)
            first = first or seen
            for station, (size, change) in sizes(first, seen).items():
                table.add(place | {"step": step, "station": station, "size": size, "change": change})
            if step < preset.moves:
                state, _ = train(state, texts[step], np.float32(2**-8))
        print(*place.values(), {name: f"{change:.3g}" for name, (_, change) in sizes(first, seen).items()}, flush=True)


def sweep(table: Table, about: dict, sized: dict, arms: tuple[str, ...], preset: Preset, data) -> None:
    """Adds a row for each arm, size and learning rate. The base is the same in all arms, and trained once."""
    from archlab.data import validation_batches
    from archlab.training.evaluation import evaluate, make_evaluate_step
    from archlab.training.trials import Fits

    base = next(iter(sized.values()))
    held_out = list(validation_batches(*data, preset.context, preset.rows, limit=16))
    lengths = data[1].bytes_per_token
    for arm, (size, config) in itertools.product(arms, sized.items()):
        places = [about | {"arm": arm, "size": size, "rate": 2.0**power} for power in preset.rates]
        places = [place for place in places if not table.has(place)]
        if not places:
            continue
        if config == base and arm != arms[0]:
            for place in places:
                [row] = [row for row in table.rows if row.items() >= (place | {"arm": arms[0]}).items()]
                table.add(row | {"arm": arm})
            continue
        model, optimizer = arm_of(arm, config, base, warmup=0.1, floor=0.0)
        fits, losses = Fits(model, preset.steps, optimizer), []
        step = make_evaluate_step(fits.structure, lengths)
        for place in places:
            fit = fits.fit(place["rate"], 0, iter(batches(data, preset, preset.steps)))
            loss = math.nan if fit.diverged else evaluate(step, fit.params, fit.rest, held_out).bits_per_byte
            losses.append(loss)
            table.add(place | {"bits_per_byte": loss, "seconds": fit.seconds})
        print(*places[0].values(), "...", *(f"{loss:.3f}" for loss in losses), flush=True)


if __name__ == "__main__":
    common.run(main)
