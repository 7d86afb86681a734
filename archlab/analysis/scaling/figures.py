"""Figures of scaling laws: every run a dot that tells what it is, every law a curve with its 95% band.

A frontier is drawn solid where there are runs, and dashed for one decade of compute beyond the largest.
"""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from archlab.analysis import plots
from archlab.analysis.accounts import short
from archlab.analysis.scaling.frontier import Multiplier, optimum, tried
from archlab.analysis.scaling.points import Points
from archlab.analysis.scaling.study import AHEAD, Study
from archlab.analysis.scaling.words import flops

N_OPT, D_OPT, LOSS = range(3)  # what `optimum` gives
FAR = 30.0  # times outside of what was tried; no optimum is drawn beyond


def told(points: Points, further: Sequence[str] = ()) -> list[str]:
    """What each run's dot tells under the pointer. further: a line more for each."""
    lines = []
    for i, label in enumerate(points.labels):
        words = [points.name, label, f"N = {short(points.N[i])}, {points.D[i] / points.N[i]:.3g} tokens per parameter",
                 f"C = {flops(points.C[i], 3)} FLOPs", f"loss {points.loss[i]:.4f}"]
        if "learning_rate" in points.more:
            words.append(f"learning rate {points.more['learning_rate'][i]:.3g}")
        lines.append("\n".join([*words, *further[i:i + 1]]))
    return lines


@plots.styled
def loss_for_compute(studies: Mapping[str, Study], colours: Mapping[str, str], loss: str) -> Figure:
    """Loss against training FLOPs: the runs, and the least loss that each law expects of that compute: among the sizes
    that were run, and beyond the largest compute among all."""
    fig, ax = plots.axes("Loss for compute", "training FLOPs", loss, "x")
    C = np.concatenate([study.points.C for study in studies.values()])
    ax.set_xlim(C.min() / 1.4, C.max() * (AHEAD if any(study.fit for study in studies.values()) else 1) * 1.4)
    ends = {}
    for name, study in studies.items():
        plots.dots(ax, study.points.C, study.points.loss, colours[name], told(study.points), size=4.6, alpha=0.6)
        ends[name] = _frontier(ax, study, colours[name], LOSS) if study.fit else float(study.points.loss[-1])
    return _finish(fig, ax, "x", ends, colours)


@plots.styled
def optimal(studies: Mapping[str, Study], colours: Mapping[str, str], which: int) -> Figure:
    """Compute-optimal N (`N_OPT`) or D (`D_OPT`) against C; stars are the minima of isoFLOP parabolas."""
    what, unit = (("N", "parameters, N"), ("D", "tokens, D"))[which]
    fig, ax = plots.axes(f"Optimal {what} for compute", "training FLOPs", unit, "xy")
    ends = {}
    for name, study in studies.items():
        if study.fit:
            ends[name] = _frontier(ax, study, colours[name], which)
        for p in study.parabolas:
            if p.inside:
                at = p.N_opt if which == N_OPT else p.D_opt
                plots.dots(ax, [p.C], [at], colours[name], [f"{name}\nminimum of the parabola\nC = "
                           f"{flops(p.C)}, {what} = {short(at)}"], marker="*", size=9, edge=0.6, zorder=4)
                ends.setdefault(name, at)
    tried = np.concatenate([getattr(study.points, what) for study in studies.values()])
    low, high = ax.get_ylim()  # where a law does not hold, its optima would be all there is to see
    ax.set_ylim(max(low, tried.min() / FAR), min(high, tried.max() * FAR))
    return _finish(fig, ax, "xy", ends, colours)


@plots.styled
def isoflop(study: Study, colour: str, loss: str, limits: tuple[float, float]) -> Figure:
    """Loss against N at equal compute: a parabola per budget in log N, its minimum starred, hollow where it lies
    outside of the sizes that were run. limits: the least and the largest loss of all such figures of a page, which
    share their axis."""
    fig, ax = plots.axes(study.points.name, "parameters, N", loss, "x")
    tones, points, ends = shades(colour, len(study.parabolas)), study.points, {}
    least, most = points.N.min() / 2, points.N.max() * 2
    for p, tone in zip(study.parabolas, tones):
        mine = points.take(points.budget == p.budget)
        plots.dots(ax, mine.N, mine.loss, tone, told(mine), size=4.6)
        seen = least <= p.N_opt <= most
        x = np.geomspace(mine.N.min(), mine.N.max(), 60)
        x = np.geomspace(min(x[0], p.N_opt), max(x[-1], p.N_opt), 60) if seen else x
        ax.plot(x, p.loss_at(x), color=tone, linewidth=1.4)
        if seen:
            words = f"{points.name}, C = {flops(p.C)}\nminimum at N = {short(p.N_opt)}\nloss {p.loss_opt:.4f}"
            plots.dots(ax, [p.N_opt], [p.loss_opt], tone, [words if p.inside else f"{words}\noutside of the runs"],
                       marker="*", size=11, hollow=not p.inside, zorder=4)
        ends[flops(p.C)] = float(mine.loss[np.argmax(mine.N)])
    room = 0.06 * (limits[1] - limits[0])
    ax.set_ylim(limits[0] - room, limits[1] + room)
    return _finish(fig, ax, "x", ends, dict(zip(ends, tones)))


@plots.styled
def residuals(studies: Mapping[str, Study], colours: Mapping[str, str], against: str) -> Figure:
    """By how much each run's loss lies above its law, in percent, against N, D or C; lines join the means of runs of
    equal N, D or C. A law that fits leaves no shape here."""
    labels = {"N": "parameters, N", "D": "tokens, D", "C": "training FLOPs"}
    fig, ax = plots.axes(f"Residuals by {against}", labels[against], "loss above the law, %", "x")
    ax.axhline(0, color=plots.MUTED, linewidth=1)
    fitted = {name: study for name, study in studies.items() if study.fit}
    for name, study in fitted.items():
        x = study.fit.law.sizes(study.points) if against == "N" else getattr(study.points, against)
        above = 100 * np.expm1(study.fit.residuals)
        words = told(study.points, [f"{value:+.2f}% from the law" for value in above])
        if against == "N" and x is not study.points.N:  # a law that has its own
            words = [f"{line}\n{short(size)} parameters by the law's own count" for line, size in zip(words, x)]
        plots.dots(ax, x, above, colours[name], words, size=4.6, alpha=0.7)
        groups = [np.isclose(x, value, rtol=1e-2) for value in _distinct(x)]
        if len(groups) <= len(x) / 2:
            ax.plot([np.exp(np.log(x[g]).mean()) for g in groups], [above[g].mean() for g in groups],
                    color=colours[name], linewidth=1.3)
    return _finish(fig, ax, "x", dict.fromkeys(fitted, ax.get_ylim()[1]), colours)


@plots.styled
def multipliers(found: Mapping[str, Multiplier], colours: Mapping[str, str], reference: str, loss: str) -> Figure:
    """Compute that architectures need over what the reference needs, at equal loss; lower losses to the right."""
    fig, ax = plots.axes(f"Compute needed, times that of {reference}", loss, "compute multiplier", "y")
    ax.axhline(1, color=plots.MUTED, linewidth=1)
    ratios = np.concatenate([m.ratio for m in found.values()])
    ratios = ratios[np.isfinite(ratios) & (ratios > 0)]
    least, most = min(1.0, *ratios) / 2, max(1.0, *ratios) * 2  # bounds may be 0 or infinite
    ends = {}
    for name, m in found.items():
        ax.fill_between(m.losses, np.clip(m.low, least, most), np.clip(m.high, least, most), color=colours[name],
                        alpha=0.16, linewidth=0)
        ax.plot(m.losses, np.clip(m.ratio, least, most), color=colours[name])
        ends[name] = float(np.clip(m.ratio[-1], least, most))
    ax.invert_xaxis()
    _finish(fig, ax, "y", ends, colours)
    if most < 20 * least:
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    return fig


def shades(colour: str, count: int) -> list[str]:
    """`count` tones of a colour, from light to dark, all of them legible on white and on black."""
    hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    top, bottom = min(0.76, light + 0.2), max(0.36, light - 0.07)
    return [to_hex(colorsys.hls_to_rgb(hue, at, saturation)) for at in np.linspace(top, bottom, max(count, 1))]


def _frontier(ax: Axes, study: Study, colour: str, which: int) -> float:
    """Draws optimal N, D or loss over compute with its band; returns the height of its right end."""
    largest, sizes = study.points.C.max(), tried(study.sample) if which == LOSS else None
    C = np.append(np.geomspace(study.points.C.min(), largest, 40), np.geomspace(largest, AHEAD * largest, 14)[1:])
    seen, ahead = C <= largest, C >= largest
    best = lambda theta: np.where(seen, optimum(theta, C, sizes)[which], optimum(theta, C)[which])
    middle = best(study.fit.theta)
    low, high = np.clip(study.sample.interval_of(best), 1e-30, 1e30)  # of no end, yet drawn
    ax.fill_between(C, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.plot(C[seen], middle[seen], color=colour)
    ax.plot(C[ahead], middle[ahead], color=colour, linewidth=1.4, linestyle=(0, (3, 2.5)))
    return float(middle[-1])


def _distinct(x: np.ndarray) -> list[float]:
    """The values of x in order, those within 1% of one another once."""
    found: list[float] = []
    for value in np.sort(x):
        if not found or value > 1.01 * found[-1]:
            found.append(float(value))
    return found


def _finish(fig: Figure, ax: Axes, log: str, ends: Mapping[str, float], colours: Mapping[str, str]) -> Figure:
    plots.fill_decades(ax, log)
    if ax.get_xlabel() == "training FLOPs":
        ax.xaxis.set_major_formatter(lambda value, _: flops(value, 1))
    plots.name_ends(ax, {name: at for name, at in ends.items() if np.isfinite(at)}, colours)
    return fig
