"""Does a learning rate that was tuned on a small model fit a wider or deeper one? Measured for any architecture.

    python -m experiments.transfer --out=runs/transfer
    python -m experiments.transfer --models=mamba-tiny --parts=coordinates,width --out=runs/mamba

Each model is resized: the smallest is the base, and others are trained as they are ("standard") and with what
`training/transfer.py` makes of them ("transfer", and over depth also "half": depth_power=0.5).

coordinates  after a few steps, how far embedding, stream, branches and logits have moved, by width: flat is right.
width        validation loss by learning rate, for each width: with transfer the best rate stays where it is.
depth        the same by depth, at one width (of the first model alone).

Prints the best rates and by how many doublings they move for each doubling of the size; leaves coordinates.csv,
sweep.csv, figures and index.html under --out. Called again with more it trains only what is missing; a model that has
changed, or its file, is trained anew, and the page shows it as it is now.

Expected (Yang et al. 2022, arXiv:2203.03466, figures 1 and 5; Dey et al. 2025, arXiv:2505.01618, figure 2): standard,
the stream moves further the wider the model and the best rate falls, by about half a doubling or more for each doubling
of the width; with transfer both stay. Over depth the same, less sharply, our initialisation being made for depth.
docs/transfer.md has what came of it. Cost: --preset=smoke a minute of four free cores; cpu some 40 minutes of four
busy ones, of which --models=transformer-tiny --parts=coordinates,width is ten; standard, with models of width 1024, is
for an accelerator.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from pathlib import Path

from absl import flags

from experiments import common
from experiments.rows import Rows


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
ABOUT = ("optimizer", "data", "preset", "version", "digest")  # version: of the model as given. digest: of the training
STATIONS = ("embedding", "stream", "branches", "logits")
CHECK = ("model", "arm", "width", "step", *(f"{what}:{name}" for name in STATIONS for what in ("size", "change")),
         *ABOUT)
RUN = ("model", "axis", "arm", "size", "rate", "bits_per_byte", "seconds", *ABOUT)

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
    files = common.named(FLAGS.models or preset.models, ())
    models = {name: common.model_config(file, []) for name, file in files.items()}
    versions = {name: version(config, files[name]) for name, config in models.items()}
    data = load_corpus(FLAGS.data)
    data = data, tokenizer_from("bytes", data)
    out.mkdir(parents=True, exist_ok=True)
    checks, runs = Rows(out / "coordinates.csv", CHECK), Rows(out / "sweep.csv", RUN)
    about = {"optimizer": FLAGS.optimizer, "data": FLAGS.data, "preset": FLAGS.preset}
    for name, config in models.items():
        mine = {"model": name, "version": versions[name]} | about
        sized = {width: resized(config, width, preset.depth) for width in widths}
        if "coordinates" in FLAGS.parts:
            coordinates(checks, mine, sized, preset, data)
        if "width" in FLAGS.parts:
            sweep(runs, mine | {"axis": "width"}, sized, ("standard", "transfer"), preset, data)
    if "depth" in FLAGS.parts:
        name, config = next(iter(models.items()))
        mine = {"model": name, "version": versions[name], "axis": "depth"} | about
        sized = {depth: resized(config, preset.width, depth) for depth in preset.depths}
        sweep(runs, mine, sized, tuple(ARMS), preset, data)
    checks = by_station(latest(checks.read(), about, versions, ("model", "arm", "width", "step")))
    runs = latest(runs.read(), about, versions, ("model", "axis", "arm", "size", "rate"))
    for key, found in best(runs).items():
        print(*key, "best rate " + ", ".join(f"{size}: {rate:.2g}" for size, (rate, _) in found.items()))
    for key, drift in drifts(runs).items():
        print(*key, f"best rate moves by {drift:+.2f} doublings for each doubling")
    about |= {"steps": preset.steps, "tokens a step": preset.rows * preset.context}
    print("page:", write_page(out, checks, runs, about))


def version(config, file: str) -> str:
    """What tells a model from what it was before a change of its config or, where it has one, its file."""
    return "v" + _sha(config.to_json(), Path(file).read_text() if file.endswith(".py") else "")


def digest(place: dict, config, base, *settings: int) -> str:
    """By which a training is found again: its place in the table, the models that it names and its settings. A letter
    first: no digest may read as a number."""
    return "r" + _sha(json.dumps(place, sort_keys=True), config.to_json(), base.to_json(), json.dumps(settings))


def _sha(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def latest(rows: list[dict], about: dict, versions: dict, place: tuple[str, ...]) -> list[dict]:
    """The rows to show: the last of each place, of models as they are now, or as they last were in other calls."""
    rows = [row for row in rows if row.items() >= about.items()]
    versions = {row["model"]: row["version"] for row in rows} | versions
    return list({tuple(row[key] for key in place): row for row in rows
                 if row["version"] == versions[row["model"]]}.values())


def by_station(rows: list[dict]) -> list[dict]:
    """Rows of the coordinate check as the page wants them: one for each station."""
    return [row | {"station": name, "size": row[f"size:{name}"], "change": row[f"change:{name}"]}
            for row in rows for name in STATIONS if row[f"size:{name}"] is not None]


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


def coordinates(table: Rows, about: dict, sized: dict, preset: Preset, data) -> None:
    """Adds a row for each arm, width and step, from before the first on; those of a training once it is finished."""
    import jax
    import numpy as np

    from archlab.analysis.stations import sizes, stations
    from archlab.layers.weights import merge
    from archlab.training.step import make_create, make_train_step, parameters

    texts, base = batches(data, preset, preset.moves + 1), next(iter(sized.values()))
    done = {(row["digest"], row["step"]) for row in table.read()}
    for arm, (width, config) in itertools.product(("standard", "transfer"), sized.items()):
        place = about | {"arm": arm, "width": width}
        place |= {"digest": digest(place, config, base, preset.moves, preset.rows, preset.context)}
        if all((place["digest"], step) in done for step in range(preset.moves + 1)):
            continue
        model, optimizer = arm_of(arm, config, base)
        transform = optimizer.build(parameters(model))
        structure, create, _ = make_create(model, transform)
        train, state = make_train_step(structure, transform, np.ones(model.vocab, np.int32)), create(0)
        look = jax.jit(lambda params, rest, ids, structure=structure: stations(merge(structure, params, rest), ids))
        first, rows = None, []
        for step in range(preset.moves + 1):
            seen = look(state.params, state.rest, texts[-1].ids)
            first = first or seen
            found = sizes(first, seen)
            pairs = {name: found.get(name, (None, None)) for name in STATIONS}  # a model may have no branches
            rows.append(place | {"step": step} | {f"size:{name}": size for name, (size, _) in pairs.items()}
                        | {f"change:{name}": change for name, (_, change) in pairs.items()})
            if step < preset.moves:
                state, _ = train(state, texts[step], np.float32(2**-8))
        for row in rows:
            table.add(row)
        print(about["model"], arm, "width", width, {name: f"{change:.3g}" for name, (_, change) in found.items()},
              flush=True)


def sweep(table: Rows, about: dict, sized: dict, arms: tuple[str, ...], preset: Preset, data) -> None:
    """Adds a row for each arm, size and learning rate. The base is the same in all arms, and trained once."""
    from archlab.data import validation_batches
    from archlab.training.evaluation import evaluate, make_evaluate_step
    from archlab.training.trials import Fits

    base = next(iter(sized.values()))
    held_out = list(validation_batches(*data, preset.context, preset.rows, limit=16))
    lengths = data[1].bytes_per_token
    done = {row["digest"]: row for row in table.read()}

    def known(arm: str, size: int, rate: float) -> dict:
        """What a row says of its training before it is begun."""
        place = about | {"arm": arm, "size": size, "rate": rate}
        return place | {"digest": digest(place, sized[size], base, preset.steps, preset.rows, preset.context)}

    def keep(row: dict) -> None:
        table.add(row)
        done[row["digest"]] = row

    for arm, (size, config) in itertools.product(arms, sized.items()):
        places = [known(arm, size, 2.0**power) for power in preset.rates]
        places = [place for place in places if place["digest"] not in done]
        if not places:
            continue
        if config == base and arm != arms[0]:
            for place in places:
                keep(done[known(arms[0], size, place["rate"])["digest"]] | place)
            continue
        model, optimizer = arm_of(arm, config, base, warmup=0.1, floor=0.0)
        fits, losses = Fits(model, preset.steps, optimizer), []
        step = make_evaluate_step(fits.structure, lengths)
        for place in places:
            fit = fits.fit(place["rate"], 0, iter(batches(data, preset, preset.steps)))
            loss = math.nan if fit.diverged else evaluate(step, fit.params, fit.rest, held_out).bits_per_byte
            losses.append(loss)
            keep(place | {"bits_per_byte": loss, "seconds": fit.seconds})
        print(about["model"], arm, about["axis"], size, "...", *(f"{loss:.3f}" for loss in losses), flush=True)


if __name__ == "__main__":
    common.run(main)
