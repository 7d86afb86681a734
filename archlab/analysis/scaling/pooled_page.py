"""The section "One law for all" of a scaling study's page: what a law over several architectures says, and how far to
trust it."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from archlab.analysis import plots
from archlab.analysis.accounts import short
from archlab.analysis.report import Report
from archlab.analysis.scaling import figures
from archlab.analysis.scaling.laws import FINE_GRAINED, JOINT_EXPERTS, RECURSIVE
from archlab.analysis.scaling.pooled import (ALIKE, BUDGETS, Pooled, best_experts, leaning, settings, span, typical,
                                             worth)
from archlab.analysis.scaling.study import coefficients
from archlab.analysis.scaling.words import flops, held

COEFFICIENTS = ("law", "coefficient", "value", "low", "high", "standard_error")
SYMBOLS = {JOINT_EXPERTS: "E", FINE_GRAINED: "G", RECURSIVE: "r"}
MEANINGS = {
    JOINT_EXPERTS: "E is the number of experts, 1 for a dense model, and Ê = E; N counts active parameters, D tokens "
                   "(Ludziejewski et al. 2025, arXiv:2502.05172, with the signs of alpha and beta as there: below 0 "
                   "where size and data help).",
    FINE_GRAINED: "G is the granularity: how many times an expert is smaller than a dense model's MLP; N counts active "
                  "parameters, D tokens (Krajewski et al. 2024, arXiv:2402.07871).",
    RECURSIVE: "r is the number of recursions, 1 for a model without; N_once and N_recurring count the unique "
               "parameters outside and inside of them, D tokens (Schwethelm et al. 2026, arXiv:2604.21106).",
}
PUBLISHED_PHI = 0.46


def write_section(page: Report, one: Pooled, colours: Mapping[str, str], out: Path) -> None:
    """Adds the section to the page, and pooled.csv and the figure as PNG to `out`; without a fit, the reason why."""
    law, fit = one.law, one.study.fit
    rows = coefficients(one.study) if fit else []
    write_table(out / "pooled.csv", COEFFICIENTS, rows)
    page.section("One law for all")
    page.text(f"Pooled are the {len(one.study.points)} runs of {', '.join(f'`{name}`' for name in one.parts)} in the "
              f"{law.name} law, L = {law.formula}. {MEANINGS[law]} Here {one.counted}.")
    if not fit:
        page.text(f"There is no such law: {one.study.refused}.")
        return
    for line in findings(one):
        page.text(line)
    _tables(page, one, rows, colours)
    figure = figures.residuals(one.parts, colours, "N")
    plots.save(figure, out / "one_law_residuals.png")
    what = "unique parameters" if law == RECURSIVE else "active parameters"
    page.figures([(figure, f"Every run against the one law for all; N are the {what}. Where it holds, no architecture "
                           "lies to one side and there is no shape in this.")])


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping]) -> None:
    """Writes these columns of the rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def findings(one: Pooled) -> list[str]:
    """Paragraphs: what the law says in its field's terms, and how well it holds."""
    lines = {JOINT_EXPERTS: _of_experts, FINE_GRAINED: _of_granularity, RECURSIVE: _of_recursion}[one.law](one)
    fit, said = one.study.fit, held(one.study)
    if fit.absent:
        said.append(f"the fit has no use for {' and '.join(fit.absent)}: these runs show no such term, and tell "
                    "nothing of an exponent in it")
    if fit.arrived < 0.5:
        said.append(f"only {fit.arrived:.0%} of the searches ended at this optimum")
    return [*lines, f"How well it holds: {'; '.join(said)}."]


def _of_recursion(one: Pooled) -> list[str]:
    phi = next(row for row in coefficients(one.study) if row["coefficient"] == "phi")
    low, high = phi["low"], phi["high"]
    nothing, whole = low <= 0 <= high, low <= 1 <= high
    verdict = ("undetermined: its interval holds 0 as well as 1" if nothing and whole else
               "not told apart from 0: these runs do not show that a further recursion is worth anything"
               if nothing else
               "not told apart from 1: a further recursion may be worth as much as unshared parameters" if whole else
               "below 0: further recursions cost loss" if high < 0 else
               "above 1: more than unshared parameters would be worth, so that the models differ in more than r"
               if low > 1 else
               "between the two: a further recursion is worth something, and less than unshared parameters")
    lines = [f"r recursions are worth r^phi times as many recurring parameters, with phi = {phi['value']:.2f} "
             f"({low:.2f} to {high:.2f}). At phi = 1 they are as good as unshared parameters, at 0 worth nothing. Here "
             f"phi is {verdict}.", _saved(one)]
    if not (nothing and whole):
        most = float(one.study.points.more["recursions"].max())
        value, least, greatest = worth(one, most)
        other = "holds" if low <= PUBLISHED_PHI <= high else "does not hold"
        lines.append(f"{most:.3g} recursions count as {value:.3g} ({least:.3g} to {greatest:.3g}) times the recurring "
                     f"parameters, for {most:.3g} times their compute. Schwethelm et al. report phi = {PUBLISHED_PHI} "
                     f"over 116 runs with r from 1 to 8; the interval here {other} that.")
    return [*lines, "phi takes in all that differs between the models, depth and learning rate too."]


def _of_experts(one: Pooled) -> list[str]:
    lines, rows = [_saved(one)], best_experts(one)
    most = one.study.points.more["experts"].max()
    for row in rows[:: BUDGETS - 1]:
        edge = ", the most that were run" if row["experts"] * ALIKE > most else ""
        interval = f"{row['low']:.3g} to {row['high']:.3g}; {row['agree']:.0%} of the resampled laws agree"
        lines.append(f"At {flops(row['FLOPs'])} FLOPs, each E at its own best N and D among the sizes that were run, "
                     f"the least loss is that of E = {row['experts']:.3g}{edge} ({interval}).")
    if not rows:
        lines.append("The numbers of experts have no range of compute in common, so that none is said to be best.")
    active = one.study.points.more.get("active_experts")
    if active is not None:
        used = active[one.study.points.more["experts"] > ALIKE]
        lines.append(f"Of the experts of a mixture a token meets {span(used)}; E counts all of them, so that the law "
                     "holds for that many alone.")
    return lines


def _of_granularity(one: Pooled) -> list[str]:
    return [_saved(one), "No term of this law grows with G: the price of routing to many small experts is not in it, "
            "and a best granularity does not follow."]


def _saved(one: Pooled) -> str:
    """By how much the loss of the largest setting lies below that of the least, at equal parameters and tokens."""
    rows, middle, symbol = settings(one), typical(one), SYMBOLS[one.law]
    kind, size = "unique" if one.law == RECURSIVE else "active", short(one.law.sizes(middle)[0])
    first, last = (f"{symbol} = {rows[i][one.dial]:.3g}" for i in (0, -1))
    sign = 1 if rows[-1]["saved"] >= 0 else -1
    low, high = sorted((sign * rows[-1]["low"], sign * rows[-1]["high"]))
    side, end = "below" if sign > 0 else "above", ": not told apart from none." if low <= 0 <= high else "."
    return (f"At equal {kind} parameters ({size}) and D ({short(middle.D[0])}) the law gives {last} a loss "
            f"{sign * rows[-1]['saved']:.4f} ({low:.4f} to {high:.4f}) {side} that of {first}{end}")


def _tables(page: Report, one: Pooled, rows: list[dict], colours: Mapping[str, str]) -> None:
    page.table(["coefficient", "value", "from", "to", "standard error"],
               [[row[key] for key in COEFFICIENTS[1:]] for row in rows],
               f"{one.study.fit.arrived:.0%} of the searches ended at this optimum. `pooled.csv` has all digits.",
               dict.fromkeys(("value", "from", "to", "standard error"), ".6g"))
    counts = lambda r: ["{:.2f} ({:.2f} to {:.2f})".format(*worth(one, r))] if one.law == RECURSIVE else []
    page.table([one.dial, "loss", "below the first", "from", "to", *["r^phi"] * (one.law == RECURSIVE)],
               [[f"{row[one.dial]:.3g}", row["loss"], row["saved"], row["low"], row["high"], *counts(row[one.dial])]
                for row in settings(one)],
               "What the law gives at equal parameters and D, in the middle of the runs.",
               {"loss": ".4f"} | dict.fromkeys(("below the first", "from", "to"), "+.4f"))
    if best := best_experts(one):
        page.table(["FLOPs", "best number of experts", "from", "to", "resampled laws that agree"],
                   [[row[key] for key in ("FLOPs", "experts", "low", "high", "agree")] for row in best],
                   "At equal compute, each number at its own best N and D among the sizes that were run.",
                   {"FLOPs": ".2e", "resampled laws that agree": ".0%"}
                   | dict.fromkeys(("best number of experts", "from", "to"), ".3g"))
    page.table(["architecture", "runs", one.dial, "mean above the law", "standard error"],
               [[name, len(part.points), span(part.points.more[one.dial]), *leaning(part)]
                for name, part in one.parts.items()],
               "An architecture whose runs lie to one side of the law differs from the others in more than its "
               f"{one.dial}.", dict.fromkeys(("mean above the law", "standard error"), "+.2%"), colours)
