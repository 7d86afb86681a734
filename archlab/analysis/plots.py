"""Figures of a comparison, in one style and with one colour for each architecture.

Figures are made without a display or global state, and saved as PNG or SVG by the name of the file. `inline_svg` gives
a figure as a fragment for a page, which takes its ink from the page's own colours. There, dots have words that show
under the pointer.
"""

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from archlab.analysis.accounts import short

COLOURS = ("#3f6fd8", "#dd7a32", "#2c9c72", "#8b5fd3", "#cf4a63", "#2499b3", "#b08a22", "#77808c", "#a4562f", "#5c8a2e")
INK, MUTED, LINE, PAPER, HOT = "#24292f", "#6b7480", "#dfe3e8", "#fefefe", "#3f6fd9"
LONGEST = 28  # letters of a name beside a curve, which would leave no room for the curve
PAGE_COLOURS = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper"}  # names of CSS variables
STYLE = {
    "figure.figsize": (5.6, 3.7), "figure.dpi": 160, "figure.facecolor": PAPER, "savefig.facecolor": PAPER,
    "axes.facecolor": "none", "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "axes.titlecolor": INK,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 12,
    "axes.labelsize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.7, "text.color": INK, "font.size": 9,
    "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "lines.linewidth": 1.8, "lines.solid_capstyle": "round", "svg.fonttype": "none", "text.parse_math": False,
}

styled = matplotlib.rc_context(STYLE)  # as a decorator: matplotlib's settings are ours inside the function only


def palette(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, in their order; give every figure of a page the same palette."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


@styled
def lines(series: Mapping[str, Sequence[tuple]], colours: Mapping[str, str], title: str, x_label: str, y_label: str,
          log: str = "", settle: float = 0.1) -> Figure:
    """Curves, named at their right ends.

    Args:
      series: name -> one (x, y) pair of equally long arrays for each run (seed); runs share their colour.
      log: which axes are logarithmic: "", "x", "y" or "xy".
      settle: the y axis begins where the curves are after this share of the x axis: a loss's first steps say nothing.
    """
    fig, ax = axes(title, x_label, y_label, log)
    ends, begins = {}, []
    for name, runs in series.items():
        runs = [tuple(np.asarray(axis, float) for axis in run) for run in runs]
        runs = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in runs]
        for x, y in (run for run in runs if len(run[0])):
            alpha = 1 if len(runs) == 1 else 0.6
            ax.plot(x, y, color=colours[name], alpha=alpha)
            if len(x) <= 8:
                words = [_told(name, x_label, a, y_label, b) for a, b in zip(x, y)]
                dots(ax, x, y, colours[name], words, size=3.5, alpha=alpha)
            ends.setdefault(name, []).append(y[-1])
            begins += [y[np.searchsorted(x, settle * x[-1])], y.min(), y[-1]]
    if begins and "y" not in log:
        low, high = min(begins), max(begins)
        ax.set_ylim(low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1))
    fill_decades(ax, log)
    name_ends(ax, {name: float(np.mean(y)) for name, y in ends.items()}, colours)
    return fig


@styled
def scatter(points: Mapping[str, tuple[float, float]], colours: Mapping[str, str], title: str, x_label: str,
            y_label: str, log: str = "x") -> Figure:
    """One named dot for each (x, y)."""
    fig, ax = axes(title, x_label, y_label, log)
    for name, (x, y) in points.items():
        dots(ax, [x], [y], colours[name], [_told(name, x_label, x, y_label, y)], size=8, edge=1.2, zorder=3)
    ax.margins(x=0.14, y=0.16)
    ax.set_xlim(ax.get_xlim())
    fill_decades(ax, log)
    to_axes = lambda x, y: ax.transAxes.inverted().transform(ax.transData.transform((x, y)))
    taken: list[tuple[float, float]] = []
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        across, up = to_axes(x, y)
        while any(abs(across - a) < 0.3 and abs(up - u) < 0.06 for a, u in taken):
            up += 0.02  # names of dots that lie close go one above another
        taken.append((across, up))
        right = across < 0.7
        ax.text(across + (0.025 if right else -0.025), up, name, color=colours[name], va="center", fontsize=9,
                ha="left" if right else "right", transform=ax.transAxes)
    return fig


def dots(ax: Axes, x: Sequence[float], y: Sequence[float], colour: str, labels: Sequence[str], marker: str = "o",
         size: float = 5, hollow: bool = False, edge: float = 0.8, **style) -> None:
    """Dots on `ax`, each of which shows its label (any text; the first line is its heading) under the pointer when the
    figure is part of a page. size: their diameter and edge: their border, in points."""
    inner, border = (PAPER, colour) if hollow else (colour, PAPER)
    for across, up, words in zip(x, y, labels, strict=True):
        (dot,) = ax.plot([across], [up], marker, markersize=size, markerfacecolor=inner, markeredgecolor=border,
                         markeredgewidth=edge, **style)
        dot.told = words


def heatmap(load: np.ndarray, title: str, x_label: str = "expert", y_label: str = "layer",
            rows: Sequence[str] | None = None) -> Figure:
    """Shares [layers, experts] of the tokens, drawn as multiples of an equal share: 1 is perfect balance."""
    load = np.asarray(load, float)
    relative = load / np.maximum(load.sum(1, keepdims=True), 1e-30) * load.shape[1]
    return matrix(relative, title, x_label, y_label, "times an equal share", 2.0, rows)


@styled
def matrix(values: np.ndarray, title: str, x_label: str, y_label: str, unit: str, top: float = 0.0,
           rows: Sequence[str] | None = None, columns: Sequence[str] | None = None) -> Figure:
    """Values [rows, columns] as shades from 0 to `top`, or to the largest value if that is more. rows, columns: their
    names, by default their numbers."""
    count, across = values.shape
    fig, ax = axes(title, x_label, y_label, "", height=min(5.6, max(2.2, 1.3 + 0.34 * count)))
    shades = LinearSegmentedColormap.from_list("load", ["#eef2fb", "#9db8f0", HOT, "#1c3a80"], N=48)
    top = max(top, float(values.max()), 1e-9)
    few = across <= 16 and count <= 32  # more have no room for numbers: they are one picture without gaps
    cells = {"edgecolor": PAPER, "linewidth": 1.5} if few else {"linewidth": 0, "rasterized": True}
    mesh = ax.pcolormesh(values, cmap=shades, vmin=0, vmax=top, **cells)
    for (i, j), value in np.ndenumerate(values) if few else ():
        ax.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7.5,
                color="#ffffff" if value > 0.55 * top else "#1f2a44")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    for names, number, ticks in ((columns, across, ax.set_xticks), (rows, count, ax.set_yticks)):
        shown = range(0, number, max(1, -(-number // 16)))
        ticks(np.array(shown) + 0.5, [str(j) if names is None else names[j] for j in shown])
    ax.invert_yaxis()
    bar = fig.colorbar(mesh, ax=ax, pad=0.02, fraction=0.04)
    bar.outline.set_visible(False)
    bar.solids.set(rasterized=False, edgecolor="face")
    bar.set_label(unit, color=MUTED)
    return fig


@styled
def intervals(groups: Mapping[str, Sequence[tuple[str, Sequence[float], float]]], x_label: str) -> Figure:
    """Groups of arms under one another, each with axes of its own: (name, value of each run, half of the interval
    around their mean)."""
    heights = [len(arms) + 1.2 for arms in groups.values()]
    fig = Figure((STYLE["figure.figsize"][0] + 1, 0.27 * sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(fig)
    for ax, (title, arms) in zip(np.atleast_1d(fig.subplots(len(groups), 1, height_ratios=heights)), groups.items()):
        for place, (_, values, half) in enumerate(arms):
            mean = float(np.mean(values))
            if np.isfinite(mean):
                ax.plot([mean - half, mean + half], [place, place], color=HOT, alpha=0.35, linewidth=5)
                ax.plot(values, [place] * len(values), "o", color=INK, markersize=3, alpha=0.7)
                ax.plot([mean], [place], "|", color=HOT, markersize=11, markeredgewidth=2)
        ax.set(title=title, ylim=(len(arms) - 0.5, -0.5))
        ax.set_yticks(range(len(arms)), [name for name, _, _ in arms])
        ax.grid(False, axis="y")
    ax.set_xlabel(x_label)
    return fig


@styled
def save(figure: Figure, path: str | Path) -> Path:
    """Writes a .png or .svg."""
    figure.savefig(path)
    return Path(path)


@styled
def inline_svg(figure: Figure, prefix: str) -> str:
    """The figure as an <svg> element for a page: no namespaces or metadata, ids of its own (they begin with `prefix`),
    the page's fonts, for ink, lines and paper the page's CSS variables, and the labels of dots as their <title>."""
    out = io.StringIO()
    told = figure.findobj(lambda artist: hasattr(artist, "told"))
    for i, artist in enumerate(told):
        artist.set_gid(f"dot-{i}")
    figure.savefig(out, format="svg", facecolor="none")
    text = out.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", text)
    text = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for colour, name in PAGE_COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    # After all else, so that nothing above can change what a label says.
    text = re.sub(rf'(<g id="{prefix}-dot-(\d+)">)',
                  lambda found: f"{found[1]}<title>{html.escape(told[int(found[2])].told)}</title>", text)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', text, count=1)


def axes(title: str, x_label: str, y_label: str, log: str, height: float | None = None) -> tuple[Figure, Axes]:
    """A figure in the style of all others, and its axes to draw on. Call it, and draw, under `styled`."""
    width, usual = STYLE["figure.figsize"]
    fig = Figure((width, height or usual), layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.add_subplot()
    ax.set(title=title, xlabel=x_label, ylabel=y_label)
    for axis, name in ((ax.xaxis, "x"), (ax.yaxis, "y")):
        if name in log:
            getattr(ax, f"set_{name}scale")("log")
            axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        else:
            axis.set_major_locator(matplotlib.ticker.MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        axis.set_major_formatter(lambda value, _: short(value, pad=False))
    return fig, ax


def fill_decades(ax: Axes, log: str) -> None:
    """Ticks at 1, 2 and 5 on logarithmic axes too short for powers of ten alone."""
    for axis, name in ((ax.xaxis, "x"), (ax.yaxis, "y")):
        low, high = axis.get_view_interval()
        if name in log and high < 100 * low:
            axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))


def name_ends(ax: Axes, ends: Mapping[str, float], colours: Mapping[str, str], gap: float = 0.065) -> None:
    """Names at the right margin at the heights of `ends`, pushed apart where they would overlap."""
    height = lambda y: ax.transAxes.inverted().transform(ax.transData.transform((ax.get_xlim()[1], y)))[1]
    at = sorted((float(np.clip(height(y), 0, 1)), name) for name, y in ends.items())
    heights = [h for h, _ in at]
    for i in range(1, len(at)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(at))):  # those pushed out at the top come down again
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    for h, (_, name) in zip(heights, at):
        name_shown = name if len(name) <= LONGEST else f"{name[:LONGEST - 1]}…"
        ax.text(1.02, h, name_shown, transform=ax.transAxes, color=colours[name], va="center", fontsize=9)


def _told(name: str, x_label: str, x: float, y_label: str, y: float) -> str:
    return f"{name}\n{x_label}: {short(x, pad=False)}\n{y_label}: {short(y, pad=False)}"
