"""Whether learning rates carry over, as figures and a page.

Rows of sweeps: model, axis ("width" or "depth"), arm, size, rate, bits_per_byte. Rows of the coordinate check: model,
arm, width, step, station, size, change.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from archlab.analysis import plots
from archlab.analysis.report import Report
from archlab.analysis.scaling.figures import shades

LEAST = "Stars: the best rates, by parabolas through the three lowest losses."
STATIONS = {"stream": "the stream behind the last block", "branches": "what a branch adds", "logits": "logits"}
ABOVE = 0.75  # bits per byte above the least that figures show


def curves(rows: Sequence[dict]) -> dict[tuple[str, str, str], dict[int, tuple[np.ndarray, np.ndarray]]]:
    """{(model, axis, arm): {size: (rates, losses)}}, rates ascending; the loss is infinite where training diverged."""
    found: dict = {}
    for row in sorted(rows, key=lambda row: (row["size"], row["rate"])):
        loss = row["bits_per_byte"]
        pairs = found.setdefault((row["model"], row["axis"], row["arm"]), {}).setdefault(row["size"], [])
        pairs.append((row["rate"], loss if math.isfinite(loss) else math.inf))
    return {key: {size: tuple(np.array(pairs).T) for size, pairs in of.items()} for key, of in found.items()}


def least(rates: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """The best rate and the lowest loss. The rate is the minimum of the parabola, in its logarithm, through the lowest
    loss and those beside it; or that of the lowest where it is at the edge or has no finite loss beside it."""
    i = int(np.argmin(losses))
    if not 0 < i < len(rates) - 1 or not np.isfinite(losses[i - 1 : i + 2]).all():
        return float(rates[i]), float(losses[i])
    parabola = np.polynomial.Polynomial.fit(np.log(rates[i - 1 : i + 2]), losses[i - 1 : i + 2], 2).convert()
    _, slope, bend = parabola.coef
    vertex = -slope / (2 * bend) if bend > 0 else math.log(rates[i])
    return math.exp(vertex), float(losses[i])


def best(rows: Sequence[dict]) -> dict[tuple[str, str, str], dict[int, tuple[float, float]]]:
    """{(model, axis, arm): {size: (best rate, its loss)}}."""
    return {key: {size: least(*curve) for size, curve in of.items()} for key, of in curves(rows).items()}


def drifts(rows: Sequence[dict]) -> dict[tuple[str, str, str], float]:
    """{(model, axis, arm): doublings of the best rate for each doubling of the size}, by least squares."""
    found = {}
    for key, of in best(rows).items():
        if len(of) > 1:
            found[key] = float(np.polyfit(np.log(list(of)), np.log([rate for rate, _ in of.values()]), 1)[0])
    return found


def lost(rows: Sequence[dict]) -> dict[tuple[str, str, str], float]:
    """{(model, axis, arm): by how many bits per byte the largest is worse at the base's best rate, of those tried, than
    at its own}."""
    found = {}
    for key, of in curves(rows).items():
        (rates, losses), (others, larger) = of[min(of)], of[max(of)]
        found[key] = float(larger[int(np.argmin(abs(np.log(others / rates[np.argmin(losses)]))))] - larger.min())
    return found


def write_page(out: Path, checks: Sequence[dict], rows: Sequence[dict], about: Mapping[str, object]) -> Path:
    """Writes index.html and its figures, as PNG too, to the folder `out`."""
    report = Report("Does the learning rate carry over?", "A rate tuned on the smallest model, on wider and deeper "
                    "ones: as they are, and with multipliers from letters and shapes (`archlab/training/transfer.py`).")
    report.facts(about)

    def show(name: str, figure: Figure, caption: str) -> tuple[Figure, str]:
        plots.save(figure, out / f"{name}.png")
        return figure, caption

    if rows:
        moved, cost, found = drifts(rows), lost(rows), best(rows)
        report.section("The best learning rates")
        report.table(["model", "by", "arm", "smallest", "its best rate", "largest", "its best rate ", "drift", "lost"],
                     [[*key, min(of), of[min(of)][0], max(of), of[max(of)][0], moved.get(key), cost[key]]
                      for key, of in found.items()],
                     "drift: doublings of the best rate for each doubling of the size; 0 is right. lost: bits per byte "
                     "by which the largest is worse at the smallest's best rate than at its own.",
                     {"drift": "+.2f", "lost": ".3f", "its best rate": ".2g", "its best rate ": ".2g"})
        report.figures([show(f"best_{model}_{axis}", _best(found, model, axis), LEAST)
                        for model, axis in dict.fromkeys(key[:2] for key in found)])
        for model, axis in dict.fromkeys(key[:2] for key in found):
            report.section(f"{model} by {axis}")
            mine = {key[2]: of for key, of in curves(rows).items() if key[:2] == (model, axis)}
            report.figures([show(f"sweep_{model}_{axis}_{arm}", _sweep(arm, axis, of, mine),
                                 f"One line for each {axis}. {LEAST}") for arm, of in mine.items()])
    for model in dict.fromkeys(row["model"] for row in checks):
        report.section(f"Coordinate check of {model}")
        report.text("The root mean square of the change since initialisation, at one learning rate for all widths, "
                    "behind each step: the later, the darker. Flat is right: every width learns at one speed.")
        report.figures([show(f"coordinates_{model}_{station}", _coordinates(checks, model, station, words),
                             _ratios(checks, model, station)) for station, words in STATIONS.items()
                        if any(row["model"] == model and row["station"] == station for row in checks)])
    return report.save(out / "index.html")


@plots.styled
def _best(found: Mapping, model: str, axis: str) -> Figure:
    fig, ax = plots.axes(model, axis, "best learning rate", "xy")
    mine = {arm: of for (m, a, arm), of in found.items() if (m, a) == (model, axis)}
    colours = plots.palette(mine)
    for arm, of in mine.items():
        rates = [rate for rate, _ in of.values()]
        ax.plot(list(of), rates, color=colours[arm])
        plots.dots(ax, list(of), rates, colours[arm], [f"{arm}\n{axis} {size}: best rate {rate:.2g}\n{loss:.3f} bits "
                                                       "per byte" for size, (rate, loss) in of.items()], "*", 10)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 5e-4), max(high, 2e-2))
    _at(ax, next(iter(mine.values())))
    plots.name_ends(ax, {arm: of[max(of)][0] for arm, of in mine.items()}, colours)
    return fig


@plots.styled
def _sweep(arm: str, axis: str, of: Mapping, all_arms: Mapping) -> Figure:
    fig, ax = plots.axes(arm, "learning rate", "bits per byte", "x")
    tones = dict(zip(of, shades(plots.COLOURS[list(all_arms).index(arm)], len(of))))
    losses = np.concatenate([losses for sizes in all_arms.values() for _, losses in sizes.values()])
    bottom = losses[np.isfinite(losses)].min()
    top = min(losses[np.isfinite(losses)].max(), bottom + ABOVE)
    ends = {}
    for size, (rates, losses) in of.items():
        ax.plot(rates, losses, color=tones[size])
        told = [f"{axis} {size}\nrate {rate:.2g}\n{loss:.3f} bits per byte" for rate, loss in zip(rates, losses)]
        plots.dots(ax, rates, losses, tones[size], told, size=3.5)
        rate, _ = least(rates, losses)
        loss = float(np.interp(math.log(rate), np.log(rates), np.where(np.isfinite(losses), losses, top)))
        plots.dots(ax, [rate], [loss], tones[size], [f"{axis} {size}\nbest rate {rate:.2g}"], "*", 11, zorder=4)
        # Those that leave the figure at its top are named in order.
        ends[f"{axis} {size}"] = min(max(losses[-1], bottom), top - 1e-6 * len(ends))
    ax.set_ylim(bottom - 0.04 * (top - bottom), top)
    ax.set_xlim(*ax.get_xlim())
    plots.fill_decades(ax, "x")
    plots.name_ends(ax, ends, dict(zip(ends, tones.values())))
    return fig


@plots.styled
def _coordinates(checks: Sequence[dict], model: str, station: str, words: str) -> Figure:
    fig, ax = plots.axes(words[0].upper() + words[1:], "width", "change, root mean square", "xy")
    mine = [row for row in checks if row["model"] == model and row["station"] == station and row["step"]]
    colours, ends, last = plots.palette(row["arm"] for row in mine), {}, max(row["step"] for row in mine)
    for arm, step in sorted({(row["arm"], row["step"]) for row in mine}):
        found = {row["width"]: row["change"] for row in mine if (row["arm"], row["step"]) == (arm, step)}
        ax.plot(list(found), list(found.values()), color=colours[arm], alpha=0.25 + 0.75 * step / last)
        told = [f"{arm}, width {width}\nbehind step {step}: {change:.3g}" for width, change in found.items()]
        plots.dots(ax, list(found), list(found.values()), colours[arm], told, size=3.5)
        ends[arm] = list(found.values())[-1]
    _at(ax, sorted({row["width"] for row in mine}))
    plots.fill_decades(ax, "y")
    plots.name_ends(ax, ends, colours)
    return fig


def _ratios(checks: Sequence[dict], model: str, station: str) -> str:
    """What the figure comes to, in words."""
    mine = [row for row in checks if row["model"] == model and row["station"] == station]
    last, small, wide = (of(row[key] for row in mine) for of, key in ((max, "step"), (min, "width"), (max, "width")))
    change = {(row["arm"], row["width"]): row["change"] for row in mine if row["step"] == last}
    ratios = ", ".join(f"{change[arm, wide] / change[arm, small]:.2g} times ({arm})"
                       for arm in dict.fromkeys(row["arm"] for row in mine))
    return f"Behind step {last} width {wide} has moved, against width {small}, {ratios}."


def _at(ax, sizes) -> None:
    """Ticks of the horizontal axis at these sizes."""
    ax.set_xticks(list(sizes), [str(size) for size in sizes])
    ax.set_xticks([], minor=True)
    ax.set_xlim(*ax.get_xlim())
