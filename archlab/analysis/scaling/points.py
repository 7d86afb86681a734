"""Points: the runs that a law is fitted to, read from tables of ours or of others.

Every way to count is one definition of N = (training FLOPs per token) / 6, so that C = 6 N D always holds exactly.
What cannot be fitted is left out by name (`Excluded`), and runs whose losses are in different units (of another corpus,
tokenizer or context) are refused.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import numpy as np

from archlab.layers.config import near

UNITS = ("corpus", "tokenizer", "context")  # losses can stand in one fit only where these agree
SAME = (*UNITS, "transfer", "eval_rows")  # ... and these, in tables that have them
NAMES = {"N": ("n", "params", "model size"), "D": ("d", "tokens"), "C": ("c", "flop", "flops", "training flop"),
         "architecture": ("architecture", "model")}
FURTHER = ("experts", "active_experts", "granularity", "recursions", "N_once", "N_recurring")  # of extended laws
AS_GIVEN = "as the table gives it"
TRIAL = "a learning rate on trial"  # why a row is left out that no one misses
ALIKE = 1e-6  # costs no further apart, in relative terms, are one: tables round them


@dataclass(frozen=True, eq=False)
class Points:
    """The runs of one architecture.

    name: the architecture. N, D, loss: [n], of which D is in tokens and 6 N the training FLOPs per token. budget: [n],
    the FLOPs aimed at (the isoFLOP group), nan where there is none. labels: a few words per run. more: further columns,
    each [n], which extended laws need. ValueError where a column has another length.
    """

    name: str
    N: np.ndarray
    D: np.ndarray
    loss: np.ndarray
    budget: np.ndarray = None
    labels: tuple[str, ...] = ()
    more: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        n = np.size(self.N)
        budget = np.full(n, np.nan) if self.budget is None else self.budget
        columns = {"N": self.N, "D": self.D, "loss": self.loss, "budget": budget}
        columns = {key: np.asarray(values, np.float64) for key, values in columns.items()}
        more = {key: np.asarray(values, np.float64) for key, values in self.more.items()}
        labels = tuple(self.labels) or tuple(f"run {i + 1}" for i in range(n))
        for key, values in (columns | more).items():
            if values.shape != (n,):
                raise ValueError(f"Points.{key} has shape {values.shape}: must be [{n}], one number per run")
        if len(labels) != n:
            raise ValueError(f"Points.labels has {len(labels)} entries: must be {n}, one per run")
        for key, value in (columns | {"labels": labels, "more": more}).items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        return self.N.size

    @property
    def C(self) -> np.ndarray:
        """Training FLOPs, [n]."""
        return 6 * self.N * self.D

    def take(self, index) -> "Points":
        """The runs at `index`: whole numbers (which may repeat), or a mask."""
        index = np.arange(len(self))[index]
        more = {key: values[index] for key, values in self.more.items()}
        labels = tuple(self.labels[i] for i in index)
        return Points(self.name, self.N[index], self.D[index], self.loss[index], self.budget[index], labels, more)


class Excluded(NamedTuple):
    """A row that is not fitted: `where` ("results.csv, line 7: mamba ...") and `why`."""

    where: str
    why: str


class Reading(NamedTuple):
    """What tables hold: Points by architecture, the rows left out, and what all of it has in common (corpus,
    tokenizer, context where stated; the loss's column; the convention by which N is counted)."""

    points: dict[str, Points]
    excluded: list[Excluded]
    about: dict[str, str]


@dataclass(eq=False)
class _Row:
    """One line; `cells` by lower-case column."""

    where: str
    architecture: str
    cells: dict[str, str]
    convention: str
    N: float
    D: float
    loss: float
    budget: float

    @property
    def place(self) -> tuple:
        """What the runs of one model and seed at one budget have in common, whatever their learning rate."""
        cost = self.D if math.isnan(self.budget) else self.budget
        return self.architecture, self.cells.get("size"), self.N, cost, self.cells.get("seed")

    @property
    def key(self) -> tuple:
        """What two rows of one run have in common. Tables of others may not say the seed: then the loss tells."""
        return self.place if self.cells.get("seed") else (*self.place, self.loss)

    @property
    def rate(self) -> float:
        """The learning rate, nan where the table does not say."""
        return _number(self.cells.get("learning_rate"))

    @property
    def label(self) -> str:
        size = self.cells.get("size") or f"N = {self.N:.3g}"
        return f"{size}, {self.D:.3g} tokens" + (f", seed {self.cells['seed']}" if self.cells.get("seed") else "")


def read_points(paths: str | Path | Sequence[str | Path], convention: str = "counted", loss: str = "loss",
                drop_highest: int = 0) -> Reading:
    """Reads tables (CSV, one row per finished run) into Points by architecture.

    Columns, in any case: of experiments.scaling, N by convention ("N:counted", ...) and tokens; of others, two of C
    (FLOPs), N and D, where a C beside N and D is not used; and the column `loss`. A table without an architecture (or
    model) is one architecture named like the file. The isoFLOP group is the column budget, or else a C that at least
    three rows share (to a millionth). Several seeds are several points; of several learning rates the best is one.

    Left out, by name: diverged runs, losses that are no positive number, learning rates on trial and those that
    another did better than, repeated rows, lines cut off; and of each architecture the `drop_highest` highest losses
    (Besiroglu et al. 2024, arXiv:2404.10102, drop five of Chinchilla's points).

    ValueError for a table without the columns, a convention that it does not have, several corpora, tokenizers,
    contexts, rules of transfer or numbers of evaluated rows, a negative drop_highest, and where nothing is left.
    """
    if drop_highest < 0:
        raise ValueError(f"drop_highest = {drop_highest}: must be 0 or more losses to leave out")
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise ValueError("paths = []: name at least one table")
    rows, excluded, spelling = [], [], {}
    for path in map(Path, paths):
        _read(path, convention, loss, rows, excluded, spelling)
    about = {"loss": loss, "convention": ", ".join(dict.fromkeys(row.convention for row in rows))} | _same(rows)
    rows = _once(_best_rates(rows, excluded), excluded)
    rows = _highest_dropped(rows, drop_highest, excluded)
    if not rows:
        why = "; ".join(f"{n} x {why}" for why, n in Counter(e.why for e in excluded).most_common(4))
        raise ValueError(f"{', '.join(map(str, paths))}: no run is left to fit ({why or 'there are no rows'})")
    groups = {name: [row for row in rows if row.architecture == name]
              for name in dict.fromkeys(row.architecture for row in rows)}
    return Reading({name: _points(name, group, spelling) for name, group in groups.items()}, excluded, about)


def _read(path: Path, convention: str, loss: str, rows: list, excluded: list, spelling: dict) -> None:
    """Adds the rows of one table that can be fitted to `rows`, the others to `excluded`."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        lines = csv.reader(io.StringIO(text, newline=""))
        header = [name.strip() for name in next(lines, [])]
        table = [(lines.line_num, [cell.strip() for cell in line]) for line in lines if line]
    except csv.Error as error:
        raise ValueError(f"{path}: not a table of comma-separated values ({error})") from None
    columns = [name.lower() for name in header]
    twice = [name for name, n in Counter(columns).items() if n > 1]
    if twice:
        raise ValueError(f"{path}: has the column {twice[0]!r} twice")
    source, counted = _columns(path, header, convention, loss)
    spelling |= dict(zip(columns, header)) | {name.lower(): name for name in FURTHER}
    groups = _groups([_positive(dict(zip(columns, line)).get(source["C"])) for _, line in table])
    for number, line in table:
        cells = dict(zip(columns, line))
        architecture = cells.get(source["architecture"]) or path.stem
        where = f"{path.name}, line {number}: {architecture}"
        unended = counted != AS_GIVEN and number == table[-1][0] and not text.endswith("\n")  # ours all have an end
        if len(line) != len(columns) or unended:
            excluded.append(Excluded(where, f"{len(line)} of {len(columns)} columns: the line is cut off or broken"))
            continue
        N, D, C, value = (_positive(cells.get(source[key])) for key in ("N", "D", "C", "loss"))
        N, D = N if source["N"] else C / 6 / D, D if source["D"] else C / 6 / N
        budget = _positive(cells["budget"]) if "budget" in columns else groups.get(C, math.nan)
        row = _Row(where, architecture, cells, counted, N, D, value, budget)
        why = _unfit(row, loss)
        rows.append(row) if why is None else excluded.append(Excluded(f"{where}, {row.label}", why))


def _columns(path: Path, header: list[str], convention: str, loss: str) -> tuple[dict[str, str | None], str]:
    """Which (lower-case) column holds what, and how N is counted; ValueError where they are not there."""
    columns = [name.lower() for name in header]
    there = f"it has {shorten(', '.join(header), 500) or 'no columns'}"
    source = {key: next((name for name in names if name in columns), None) for key, names in NAMES.items()}
    source["loss"] = loss.lower()
    if source["loss"] not in columns:
        raise ValueError(f"{path}: has no column {loss!r}; {there}")
    conventions = [name[2:] for name in header if name.lower().startswith("n:")]
    if conventions:
        if convention not in conventions:
            raise ValueError(f"{path}: does not count N by the convention {convention!r}; "
                             f"{near(convention, conventions)}")
        source |= {"N": f"n:{convention}".lower(), "C": None}
    elif convention != "counted":
        raise ValueError(f"{path}: has no column 'N:{convention}', so that it can be read with "
                         f"the convention 'counted' alone, which takes its N as given; {there}")
    if sum(source[key] is not None for key in "NDC") < 2:
        raise ValueError(f"{path}: needs two of the columns C (training FLOPs), N (parameters) and D (tokens); {there}")
    return source, convention if conventions else AS_GIVEN


def _groups(costs: list[float]) -> dict[float, float]:
    """To each cost that at least three rows share: the least of its group, for all of them the same number."""
    costs = np.sort([cost for cost in costs if not math.isnan(cost)])
    groups = np.split(costs, np.flatnonzero(np.diff(costs) > ALIKE * costs[:-1]) + 1)
    return {float(cost): float(group[0]) for group in groups if len(group) >= 3 for cost in group}


def _unfit(row: _Row, loss: str) -> str | None:
    """Why a row cannot be fitted, or None."""
    if row.cells.get("diverged", "").lower() in ("true", "yes", "1"):
        return "diverged"
    if row.cells.get("role") == "trial":
        return TRIAL
    for name, value in (("N", row.N), ("D", row.D)):
        if not value > 0:
            return f"{name} is no positive number"
    if not row.loss > 0:
        return f"{loss} = {row.cells[loss.lower()]!r} is no positive number"
    return None


def _same(rows: list[_Row]) -> dict[str, str]:
    """What all rows agree on; ValueError where their losses would not compare."""
    about = {}
    for column in SAME:
        values = Counter(row.cells.get(column) or "not stated" for row in rows
                         if column in UNITS or column in row.cells)
        if len(values) > 1:
            told = ", ".join(f"{value} ({n} runs)" for value, n in values.most_common())
            why = "are in different units" if column in UNITS else "do not compare"
            raise ValueError(f"runs of different {column} in one fit: {told}; their losses {why}, so fit them from "
                             "separate tables")
        about |= {column: value for value in values if value != "not stated"}
    return about


def _best_rates(rows: list[_Row], excluded: list) -> list[_Row]:
    """The rows without those of a learning rate that another, of the same model, seed and budget, did better than."""
    best = {}
    for row in rows:
        if not math.isnan(row.rate) and row.loss < best.setdefault(row.place, row).loss:
            best[row.place] = row
    beaten = [row for row in rows if row.place in best and abs(row.rate - best[row.place].rate) > 0]  # nan is no other
    excluded += [Excluded(f"{row.where}, {row.label}", f"another learning rate did better: {best[row.place].rate:.6g} "
                          f"in {best[row.place].where} (loss {best[row.place].loss:.6g} there, {row.loss:.6g} here)")
                 for row in beaten]
    return [row for row in rows if row not in beaten]


def _once(rows: list[_Row], excluded: list) -> list[_Row]:
    """The rows without those that repeat an earlier one."""
    first = {}
    for row in rows:
        known = first.setdefault(row.key, row)
        if known is not row:
            why = f"the same run as {known.where}, which is kept"
            other = "" if row.loss == known.loss else f" (loss {known.loss:.6g} there, {row.loss:.6g} here)"
            excluded.append(Excluded(f"{row.where}, {row.label}", why + other))
    return list(first.values())


def _highest_dropped(rows: list[_Row], number: int, excluded: list) -> list[_Row]:
    """The rows without the `number` highest losses of each architecture."""
    dropped = []
    for name in dict.fromkeys(row.architecture for row in rows):
        group = sorted((row for row in rows if row.architecture == name), key=lambda row: -row.loss)
        dropped += group[:number]
    excluded += [Excluded(f"{row.where}, {row.label}", f"among the {number} highest losses (drop_highest)")
                 for row in dropped]
    return [row for row in rows if row not in dropped]


def _points(name: str, rows: list[_Row], spelling: dict[str, str]) -> Points:
    """Further columns are those that every row has as a number."""
    column = lambda values: np.array(list(values), np.float64)
    further = {spelling[key]: column(_number(row.cells.get(key)) for row in rows) for key in rows[0].cells}
    return Points(name, N=column(row.N for row in rows), D=column(row.D for row in rows),
                  loss=column(row.loss for row in rows),
                  budget=column(row.budget for row in rows), labels=tuple(row.label for row in rows),
                  more={key: values for key, values in further.items() if np.isfinite(values).all()})


def _number(cell: str | None) -> float:
    """What a cell says; nan where that is no number."""
    try:
        return float(cell or "nan")
    except ValueError:
        return math.nan


def _positive(cell: str | None) -> float:
    """What a cell says; nan where that is not a finite number above 0."""
    value = _number(cell)
    return value if 0 < value < math.inf else math.nan
