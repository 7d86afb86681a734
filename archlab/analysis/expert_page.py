"""One page about the experts of a model: where the tokens of a text went, and where those of training."""

from collections.abc import Mapping, Sequence

import numpy as np

from archlab.analysis import plots
from archlab.analysis.expert_text import SCRIPT, expert_text
from archlab.analysis.experts import ExpertLayer, coactivation, load_by_class, load_over_training
from archlab.analysis.report import Report
from archlab.analysis.token_classes import CLASSES, token_classes

SHOWN = 1536  # tokens of coloured text


def expert_page(title: str, layers: Sequence[ExpertLayer], pieces: Sequence[bytes], real: np.ndarray,
                record: Sequence[dict], settings: Mapping[str, object]) -> Report:
    """The page.

    Args: layers: from `look`, in order. pieces: the bytes of each real token; real [B, T]: which tokens of the text
      those are. record: rows of the run's experts.jsonl, none where there was no run. settings: how it was made.
    """
    seeing = [layer for layer in layers if layer.choices is not None]
    sizes = sorted({len(layer.load) for layer in layers})
    page = Report(title, f"Where {len(pieces):,} tokens went, in {len(layers)} layers with experts")
    page.facts({"layers with experts": len(layers), "experts": " or ".join(map(str, sizes)),
                "experts a token": " or ".join(sorted({str(layer.choices.shape[-1]) for layer in seeing})) or "–",
                "tokens": len(pieces)})
    page.section("All layers")
    _overview(page, layers, sizes)
    _collapses(page, record)
    page.section("Layer by layer")
    if seeing:
        page.text("Each token has the colour of its first expert; under the pointer it tells them all. Choose a layer, "
                  "or an expert to see whatever went there. Shares are of all choices. A line across the text begins a "
                  "new row: what comes after it was read without what is before."
                  + (" A wavy line is under tokens of which training would drop choices."
                     if any(layer.lost is not None for layer in seeing) else ""))
        places = np.flatnonzero(real.reshape(-1))[:SHOWN]
        breaks = np.flatnonzero(np.diff(places // real.shape[1])) + 1
        shown = [piece.decode(errors="replace") or "·" for piece in pieces[:SHOWN]]
        page.raw(expert_text(shown, set(breaks.tolist()), places, seeing))
        if len(pieces) > SHOWN:
            page.text(f"These are the first {SHOWN:,} tokens; the figures are about all of them.")
        classes = token_classes(pieces)
        for i, layer in enumerate(seeing):
            page.raw(f'<div data-layer="{i}">')
            page.figures(_figures(layer, layer.choices[real], classes, record))
            page.raw("</div>")
        page.raw(f"<script>{SCRIPT}</script>")
    else:
        page.text("No layer saw every token of the text, so there is no choice to show for each.")
    page.section("How it was made")
    page.facts(settings)
    return page


def _overview(page: Report, layers: Sequence[ExpertLayer], sizes: Sequence[int]) -> None:
    numbered = list(enumerate(layers, 1))
    page.table(["layer", "path", "experts", "entropy", "entropy of the mean", "max violation", "largest logit",
                "dropped in training, %"],
               [[str(i), layer.path, len(layer.load), layer.entropy, layer.mean_entropy, layer.max_violation,
                 layer.largest_logit, None if layer.dropped is None else 100 * layer.dropped]
                for i, layer in numbered],
               "Entropy in nats of a token's probabilities, low for a router that is sure, and of their mean, "
               f"{' or '.join(f'{np.log(size):.2f}' for size in sizes)} for one that uses all experts alike. Max "
               "violation is the load of the busiest expert above its fair share, in such shares. What a capacity "
               "drops is seen in the training form, and only there.",
               {"entropy": ".3f", "entropy of the mean": ".3f", "max violation": ".2f", "largest logit": ".1f",
                "dropped in training, %": ".1f"})
    drawn = []
    for size in sizes:
        rows = [(str(i), layer.load) for i, layer in numbered if len(layer.load) == size]
        drawn.append((plots.heatmap(np.stack([load for _, load in rows]), "Load on this text",
                                    rows=[name for name, _ in rows]), "The share of the choices that fell on each "
                      "expert, in times of an equal one."))
    if len(layers) > 1:
        at = np.arange(1, len(layers) + 1)
        curves = {"of a token": [layer.entropy for layer in layers],
                  "of the mean": [layer.mean_entropy for layer in layers]}
        figure = plots.lines({name: [(at, values)] for name, values in curves.items()}, plots.palette(curves),
                             "Entropy of the router", "layer", "nats", settle=0)
        figure.axes[0].xaxis.get_major_locator().set_params(integer=True)
        drawn.append((figure, "How undecided the router is about a token, and how evenly it decides over all of them."))
    page.figures(drawn)


def _collapses(page: Report, record: Sequence[dict]) -> None:
    told = [row["collapse"] | {"step": row["step"]} for row in record if "collapse" in row]
    if told:
        page.table(["step", "layer", "path", "experts", "starving since step"],
                   [[t["step"], str(t["layer"]), t["path"], ", ".join(map(str, t["experts"])), t["since"]]
                    for t in told], "Experts that collapsed in training: the router had all but stopped choosing them.")


def _figures(layer: ExpertLayer, choices: np.ndarray, classes: np.ndarray, record: Sequence[dict]) -> list:
    """Figures of one layer. choices [N, k] and classes [N]: of the real tokens."""
    experts, drawn = len(layer.load), []
    steps, loads = load_over_training(record, layer.path)
    if len(steps):
        drawn.append((plots.matrix(loads.T * experts, "Load over training", "step", "expert", "times an equal share",
                                   2.0, columns=[f"{step:,}" for step in steps]),
                      "The share of each step's choices that fell on each expert."))
    present = np.flatnonzero(np.bincount(classes, minlength=len(CLASSES)))
    by_class = load_by_class(choices, classes, len(CLASSES), experts)[present]
    counts = np.bincount(classes, minlength=len(CLASSES))
    drawn.append((plots.heatmap(by_class, "Load by class of token", y_label="class",
                                rows=[f"{CLASSES[c]} ({counts[c]:,})" for c in present]),
                  "Of each class of tokens, the share that went to each expert: rows that differ are "
                  "specialisation. Code and prose are told apart by a guess about their line."))
    if choices.shape[-1] > 1:
        drawn.append((plots.matrix(coactivation(choices, experts), "Chosen together", "expert", "of the tokens of",
                                   "share"),
                      "Of the tokens that went to the expert of the row, the share that also went to that of the "
                      "column."))
    return drawn
