"""The page of a scaling study: how much compute architectures need against one another, and what that rests on.

What it says in words follows from the points and the fits; nothing is claimed beyond them.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from archlab.analysis import plots
from archlab.analysis.accounts import short
from archlab.analysis.report import Report
from archlab.analysis.scaling import figures
from archlab.analysis.scaling.frontier import Multiplier, gap
from archlab.analysis.scaling.laws import DENSE
from archlab.analysis.scaling.points import TRIAL, Reading
from archlab.analysis.scaling.pooled import Pooled
from archlab.analysis.scaling.pooled_page import write_section, write_table
from archlab.analysis.scaling.study import (AHEAD, Study, allocations, by_approach, by_convention, coefficients,
                                            compared, study)
from archlab.analysis.scaling.words import caveats, flops, headline
from archlab.layers.config import near

COEFFICIENTS = ("architecture", "coefficient", "value", "low", "high", "standard_error")
MULTIPLIERS = ("architecture", "reference", "loss", "ratio", "low", "high", "verdict")
DRAWN = 25  # losses at which multipliers are drawn
NAMES = (*DENSE.names, "a", "b")


def write_page(out: Path, reading: Reading, settings: Mapping[str, object], command: str = "", loss: str = "loss",
               reference: str | None = None, repetitions: int = 1000, by: str = "residuals",
               one_law: Pooled | None = None) -> Path:
    """Fits every architecture's law and writes scaling.html, its figures as PNG, fits.csv and multipliers.csv to `out`.

    An architecture that no law can be fitted to is shown with the reason. Returns the page's path.

    Args: settings: shown at the end. command: what makes this page again. loss: what the loss is called, with its unit.
      reference: the architecture that others are compared with, by default the first that has a fit. repetitions, by:
      of the bootstrap. one_law: for all architectures together; it gets a section and pooled.csv. ValueError for a
      reference that is not there.
    """
    studies = {name: study(points, repetitions, by) for name, points in reading.points.items()}
    reference = _reference(studies, reference)
    out.mkdir(parents=True, exist_ok=True)
    fits = [row for one in studies.values() if one.fit for row in coefficients(one)]
    found = compared(studies, reference)
    write_table(out / "fits.csv", COEFFICIENTS, fits)
    write_table(out / "multipliers.csv", MULTIPLIERS, [row for m in found.values() for row in _multipliers(m)])
    drawn = _figures(studies, compared(studies, reference, DRAWN), reference, loss)
    for file, (figure, _) in drawn.items():
        plots.save(figure, out / f"{file}.png")
    runs = sum(map(len, reading.points.values()))
    convention = reading.about["convention"]
    page = Report("Scaling laws", f"{', '.join(studies)}: {runs} runs; N and C: {convention}")
    colours = plots.palette(studies)
    _compare(page, studies, found, reference, loss, drawn, colours)
    _isoflop(page, studies, drawn, colours)
    _laws(page, studies, fits, drawn, colours)
    if one_law:
        write_section(page, one_law, colours, out)
    _optima(page, studies, drawn, colours)
    page.section("What this shows, and what it does not")
    for line in caveats(studies, found):
        page.text(line)
    _left_out(page, reading)
    page.section("How it was made")
    page.facts({**reading.about, "bootstrap": f"{repetitions} by {by}", **settings})
    page.text("The law is L = E + A / N^alpha + B / D^beta, with C = 6 N D: N is the training FLOPs per token over 6, "
              "by the convention named above. It is fitted by the summed Huber loss (1e-3) of log L from many starts. "
              "Intervals are of 95%, percentiles over the bootstrap.")
    if command:
        page.code(command)
    return page.save(out / "scaling.html")


def _compare(page: Report, studies, found, reference: str, loss: str, drawn, colours) -> None:
    page.section("How much compute for equal loss")
    for line in headline(studies, found, reference):
        page.text(line)
    page.figures([drawn[file] for file in ("loss_for_compute", "multipliers") if file in drawn])
    rows = [row for m in found.values() for row in _multipliers(m)]
    if rows:
        page.table(["architecture", loss, "multiplier", "from", "to", "verdict"],
                   [[row[key] for key in ("architecture", "loss", "ratio", "low", "high", "verdict")] for row in rows],
                   f"Compute over that of {reference} at equal loss, each at its own optimal size; below 1 the "
                   "architecture saves. Only at losses that both reached; a dash stands for a bound that the runs do "
                   "not give. `multipliers.csv` has all digits.",
                   {loss: ".4f", "multiplier": "#.3g", "from": "#.3g", "to": "#.3g"}, colours)
    for name in found:
        at_equal = gap(studies[name].sample, studies[reference].sample)
        page.text(f"At equal compute, `{name}` against `{reference}`: {at_equal.verdict}.")


def _isoflop(page: Report, studies, drawn, colours) -> None:
    files = [file for file in drawn if file.startswith("isoflop")]
    if files:
        page.section("Loss at equal compute")
        page.text("A parabola in log N for each budget, in FLOPs. The star is its minimum, hollow where it lies "
                  "outside of the sizes that were run.")
        if any(p.C != p.budget for one in studies.values() for p in one.parabolas):
            page.text("Runs of one budget are not of equal 6 N D by this convention: the compute named is that at the "
                      "minimum, between those of the sizes next to it.")
        page.figures([drawn[file] for file in files])
    budgets = sorted({budget for one in studies.values() for budget in one.points.budget if np.isfinite(budget)})
    if budgets:
        best = [[min(one.points.loss[one.points.budget == budget], default=None) for one in studies.values()]
                for budget in budgets]
        page.table(["training FLOPs", *studies], [[flops(budget), *row] for budget, row in zip(budgets, best)],
                   "The best run of each budget: what was measured, without any law. Of few sizes and one seed, the "
                   "best is partly luck.", dict.fromkeys(studies, ".4f"))


def _laws(page: Report, studies, fits, drawn, colours) -> None:
    if not fits:
        return
    page.section("The laws")
    ordered = sorted(fits, key=lambda row: NAMES.index(row["coefficient"]))
    page.table(["architecture", "coefficient", "value", "from", "to", "standard error"],
               [[row[key] for key in COEFFICIENTS] for row in ordered],
               "L = E + A / N^alpha + B / D^beta; a = beta / (alpha + beta) and b = 1 - a are the exponents of optimal "
               "N and D. `fits.csv` has all digits.", dict.fromkeys(("value", "from", "to", "standard error"), ".6g"),
               colours)
    page.figures([drawn[file] for file in drawn if file.startswith("residuals")])
    page.table(["architecture", "runs", "spread about the law", "error on the largest budget", "bias there",
                "runs there", "searches that agree"],
               [[name, len(one.points), one.spread(), *_held(one), one.fit.arrived]
                for name, one in studies.items() if one.fit],
               "The largest budget is left out, the law fitted to the rest and asked about it: the mean of |error|, "
               "and as bias the mean error, above 0 where the law was too pessimistic.",
               {"spread about the law": ".2%", "error on the largest budget": ".2%", "bias there": "+.2%",
                "searches that agree": ".0%"}, colours)


def _held(one: Study) -> list:
    held = one.holdout
    return [held.mean_error, held.bias, len(held.left_out)] if held else [None, None, 0]


def _optima(page: Report, studies, drawn, colours) -> None:
    if "optimal_N" not in drawn:
        return
    page.section("Optimal size and data")
    page.figures([drawn[file] for file in ("optimal_N", "optimal_D")])
    interval = lambda row, key: f"{short(row[f'{key}_low'])} to {short(row[f'{key}_high'])}"
    page.table(["architecture", "FLOPs", "N", "95%", "D", "95% ", "D / N", "loss", "extrapolated"],
               [[row["architecture"], row["FLOPs"], row["N"], interval(row, "N"), row["D"], interval(row, "D"),
                 row["tokens_per_parameter"], row["loss"], row["extrapolated"]]
                for one in studies.values() if one.fit for row in allocations(one)],
               f"Extrapolated: which of C, N and D lie outside of the runs; C by at most {AHEAD:.0f} times.",
               {"FLOPs": ".2e", "loss": ".4f"}, colours)
    page.table(["architecture", "approach", "a of N ~ C^a", "from", "to"],
               [[row[key] for key in ("architecture", "approach", "value", "low", "high")]
                for one in studies.values() for row in by_approach(one)],
               "Three ways to the same exponent. Parabolas are biased even without noise unless alpha = beta and the "
               "sizes lie evenly about the optimum; the envelope takes luck for skill. All other numbers on this page "
               "are from the law.", dict.fromkeys(("a of N ~ C^a", "from", "to"), ".4f"), colours)
    conventions = {name: by_convention(one.points) for name, one in studies.items()}
    columns = list(dict.fromkeys(column for row in conventions.values() for column in row))
    if len(columns) > 1:
        page.text("N is a matter of convention: parameters may be counted with or without embeddings, FLOPs with or "
                  "without attention. The same runs give these exponents a of N_opt ~ C^a:")
        page.table(["architecture", *columns],
                   [[name, *(row.get(column) for column in columns)] for name, row in conventions.items()],
                   "C is 6 N D by each convention's own N.", dict.fromkeys(columns, ".4f"), colours)


def _left_out(page: Report, reading: Reading) -> None:
    page.section("What was left out")
    trials = [row for row in reading.excluded if row.why == TRIAL]
    if trials:
        page.text(f"{len(trials)} runs tried learning rates, of which the best of each size went on.")
    if len(reading.excluded) > len(trials):
        page.table(["row", "why"], [list(row) for row in reading.excluded if row.why != TRIAL])
    elif not trials:
        page.text("Nothing: every row was read as a run.")


def _figures(studies: Mapping[str, Study], found: Mapping[str, Multiplier], reference: str, loss: str) -> dict:
    """File name -> (figure, caption)."""
    colours = plots.palette(studies)
    fitted = any(one.fit for one in studies.values())
    made = {"loss_for_compute": (figures.loss_for_compute(studies, colours, loss),
                                 "Each dot is a run. The line is the least loss that the law expects of a compute, "
                                 "dashed beyond the runs, with its 95% band.")}
    if any(len(m.losses) for m in found.values()):
        made["multipliers"] = (figures.multipliers(found, colours, reference, loss),
                               f"Below 1 the architecture needs less compute than {reference} for the same loss; bands "
                               "are of 95%, cut at the figure's edge where they have no end.")
    grouped = [one.points.loss[np.isfinite(one.points.budget)] for one in studies.values() if one.parabolas]
    for name, one in studies.items():
        if one.parabolas:
            limits = min(map(np.min, grouped)), max(map(np.max, grouped))
            minima = ", ".join(f"{short(p.N_opt)} at {flops(p.C)}" for p in one.parabolas if p.inside)
            made[_file(f"isoflop_{name}", made)] = (figures.isoflop(one, colours[name], loss, limits),
                                                    f"Minima: {minima or 'none inside of the sizes run'}.")
    if fitted:
        for which, what in ((figures.N_OPT, "N"), (figures.D_OPT, "D")):
            made[f"optimal_{what}"] = (figures.optimal(studies, colours, which),
                                       "By the law, dashed beyond the runs, with its 95% band; stars are the minima of "
                                       "isoFLOP parabolas.")
        for what in "NC":
            made[f"residuals_{what}"] = (figures.residuals(studies, colours, what),
                                         "Where the law holds there is no shape in this; lines join means of runs at "
                                         f"equal {what}.")
    return made


def _file(name: str, taken: Mapping) -> str:
    """A file's name from an architecture's, which may hold anything."""
    name = re.sub(r"[^\w.+-]+", "_", name)[:80]
    while name in taken:
        name += "_"
    return name


def _reference(studies: Mapping[str, Study], reference: str | None) -> str:
    if reference is None:
        return next((name for name, one in studies.items() if one.fit), next(iter(studies)))
    if reference not in studies:
        raise ValueError(f"reference = {reference!r}: must be an architecture of the table; {near(reference, studies)}")
    return reference


def _multipliers(m: Multiplier) -> list[dict]:
    return [{"architecture": m.a, "reference": m.b, "loss": loss, "ratio": ratio, "low": low, "high": high,
             "verdict": "saves" if high < 1 else "costs" if low > 1 else
                       "not distinguishable" if low > 0 and np.isfinite(high) else "undetermined"}
            for loss, ratio, low, high in zip(m.losses, m.ratio, m.low, m.high)]
