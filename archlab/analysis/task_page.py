"""What tasks decided, as one matrix (architecture x task), its figures and a page.

Rows come from finished runs: dicts with model, task, width, seed, learning_rate, state_bytes, validation_accuracy,
validation_loss and tests {label: accuracy}.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from archlab.analysis import plots
from archlab.analysis.comparison import write_csv
from archlab.analysis.report import Report
from archlab.data.tasks import MQAR, Task, Tracking
from archlab.training.accuracy import scaled

SHADES = LinearSegmentedColormap.from_list("accuracy", ["#f6f2ea", "#cfe0c3", "#6fae83", "#1d6b52"], N=64)


def best_rate(rows: Sequence[dict]) -> float:
    """The learning rate with the highest accuracy in validation of seed 0; of equals that with the lower loss."""
    first = [row for row in rows if row["seed"] == 0]
    key = lambda row: (row["validation_accuracy"], -row["validation_loss"])
    return max(first, key=key)["learning_rate"]


def summarise(rows: Sequence[dict], tasks: Mapping[str, Task]) -> list[dict]:
    """A row for each (model, task, width, test): the mean over the seeds at the best rate and the sample standard
    deviation (None for one seed), of the accuracy; for tasks that track a state of the scaled accuracy."""
    cells = {}
    for row in rows:
        cells.setdefault((row["model"], row["task"], row["width"]), []).append(row)
    table = []
    for (model, task, width), runs in cells.items():
        rate, chance = best_rate(runs), tasks[task].chance
        chosen = [run for run in runs if run["learning_rate"] == rate]
        for label in chosen[0]["tests"]:
            found = [run["tests"][label] for run in chosen]
            if tracks := isinstance(tasks[task], Tracking):
                found = [scaled(value, chance) for value in found]
            table.append({
                "model": model, "task": task, "width": width, "test": label, "seeds": len(found),
                "measure": "scaled accuracy" if tracks else "accuracy", "score": statistics.fmean(found),
                "spread": statistics.stdev(found) if len(found) > 1 else None, "chance": 0.0 if tracks else chance,
                "learning_rate": rate, "state_bytes": chosen[0]["state_bytes"], "parameters": chosen[0]["parameters"]})
    return table


def columns_of(tasks: Mapping[str, Task]) -> list[tuple[str, str]]:
    """The columns of the matrix, (task, test): what was trained on, and the last and hardest test."""
    found = []
    for name, task in tasks.items():
        labels = list(task.tests())
        found += [(name, label) for label in dict.fromkeys((labels[0], labels[-1]))]
    return found


def matrix_of(table: Sequence[dict], tasks: Mapping[str, Task]) -> tuple[list[str], np.ndarray]:
    """Names of the models and scores [models, columns of `columns_of`] at the largest width; nan for none."""
    models = list(dict.fromkeys(row["model"] for row in table))
    widest = {task: max((row["width"] for row in table if row["task"] == task), default=0) for task in tasks}
    score = {(row["model"], row["task"], row["test"]): row["score"] for row in table
             if row["width"] == widest[row["task"]]}
    values = [[score.get((model, *column), np.nan) for column in columns_of(tasks)] for model in models]
    return models, np.array(values, float).reshape(len(models), -1)


def write_matrix(path: Path, table: Sequence[dict], tasks: Mapping[str, Task]) -> None:
    """The matrix as CSV, with a first row for chance."""
    models, values = matrix_of(table, tasks)
    names = [f"{task}: {test}" for task, test in columns_of(tasks)]
    chance = [0.0 if isinstance(tasks[task], Tracking) else tasks[task].chance for task, _ in columns_of(tasks)]
    lines = [("chance", chance), *zip(models, values)]
    write_csv(path, [{"model": model} | {name: None if np.isnan(value) else round(float(value), 4)
                                         for name, value in zip(names, line)} for model, line in lines])


@plots.styled
def heatmap(models: Sequence[str], values: np.ndarray, tasks: Mapping[str, Task]) -> Figure:
    """The matrix as shades from 0 to 1; chance is written under each task's name."""
    columns = columns_of(tasks)
    fig = Figure((2.4 + 0.72 * len(columns), 1.9 + 0.3 * len(models)), layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.add_subplot()
    shown = np.ma.masked_invalid(np.clip(values, 0, 1))
    ax.pcolormesh(shown, cmap=SHADES, vmin=0, vmax=1, edgecolor=plots.PAPER, linewidth=1.5)
    for (i, j), value in np.ndenumerate(values):
        ax.text(j + 0.5, i + 0.5, "–" if np.isnan(value) else f"{value:.2f}", ha="center", va="center", fontsize=8,
                color="#ffffff" if value > 0.75 else "#1f2a24")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_yticks(np.arange(len(models)) + 0.5, models)
    labels = [f"{task}\n{test} (chance {'0' if isinstance(tasks[task], Tracking) else f'{tasks[task].chance:.2g}'})"
              for task, test in columns]
    ax.set_xticks(np.arange(len(columns)) + 0.5, labels, rotation=38, ha="left", rotation_mode="anchor")
    ax.xaxis.tick_top()
    ax.invert_yaxis()
    return fig


def figures(table: Sequence[dict], tasks: Mapping[str, Task]) -> dict[str, tuple[Figure, str]]:
    """File name -> (figure, caption): the matrix; accuracy against length where tests differ in nothing else; and of
    recall against the bytes of the state."""
    models, values = matrix_of(table, tasks)
    colours = plots.palette(models)
    made = {"matrix": (heatmap(models, values, tasks), "Mean over seeds at each model's best learning rate. A task's "
                       "first column is what was trained on, its second the longest test.")}
    for name, task in tasks.items():
        mine = [row for row in table if row["task"] == name]
        lengths = [label for label in task.tests() if label.isdigit()]
        widest = max((row["width"] for row in mine), default=0)
        curves = {}
        for model in models:
            found = {row["test"]: row["score"] for row in mine if row["model"] == model and row["width"] == widest}
            if found and len(lengths) > 2:
                points = sorted((int(label), found[label]) for label in lengths)
                curves[model] = [tuple(np.array(points, float).T)]
        if curves:
            trained, measure = list(task.tests())[0], mine[0]["measure"]
            chance = 0 if isinstance(task, Tracking) else task.chance
            title = f"Beyond the trained length: {name}"
            made[f"length_{name}"] = (_whole(plots.lines(curves, colours, title, "tokens", measure, log="x")),
                                      f"Trained at {trained} tokens; chance is {chance:.2g}.")
        if isinstance(task, MQAR) and (curves := _by_state(mine, models)):
            made[f"state_{name}"] = (_whole(plots.lines(curves, colours, f"Recall for memory: {name}",
                                                        "bytes of state per text", "accuracy", log="x")),
                                     f"Each point is a width; the state is that of {task.length} tokens, as the model "
                                     f"keeps it in decoding. Chance is {task.chance:.2g}.")
    return made


def _whole(figure: Figure) -> Figure:
    """The figure with all of what an accuracy can be on its y axis."""
    figure.axes[0].set_ylim(-0.06, 1.06)
    return figure


def _by_state(rows: Sequence[dict], models: Sequence[str]) -> dict[str, list[tuple]]:
    first = rows[0]["test"] if rows else None
    curves = {}
    for model in models:
        points = sorted((row["state_bytes"], row["score"]) for row in rows if row["model"] == model
                        and row["test"] == first)
        if points:
            curves[model] = [tuple(np.array(points, float).T)]
    return curves


def write_page(out: Path, table: Sequence[dict], tasks: Mapping[str, Task], settings: Mapping[str, object]) -> Path:
    """Writes matrix.csv, scores.csv, the figures as PNG and tasks.html into `out`; returns the page's path."""
    write_csv(out / "scores.csv", table)
    write_matrix(out / "matrix.csv", table, tasks)
    drawn = figures(table, tasks)
    for file, (figure, _) in drawn.items():
        plots.save(figure, out / f"{file}.png")
    models, values = matrix_of(table, tasks)
    page = Report("What tasks decide", f"{len(models)} sequence mixers in the same network, {len(tasks)} tasks")
    page.section("Matrix")
    page.figures([drawn["matrix"]])
    names = [f"{task}: {test}" for task, test in columns_of(tasks)]
    chance = [0.0 if isinstance(tasks[task], Tracking) else tasks[task].chance for task, _ in columns_of(tasks)]
    page.table(["model", *names], [["chance", *chance]] + [[m, *map(float, line)] for m, line in zip(models, values)],
               "Accuracy on scored tokens; of state tracking scaled, (accuracy - chance) / (1 - chance), so that 0 is "
               "guessing. `matrix.csv` is this table, `scores.csv` has every test and its spread over seeds, and "
               "`results.csv` every run.", {name: ".3f" for name in names}, plots.palette(models))
    rest = [pair for file, pair in drawn.items() if file != "matrix"]
    if rest:
        page.section("Length and memory")
        page.figures(rest)
    page.section("What theory says")
    for name, task in tasks.items():
        theory = type(task).__doc__.split("Theory:")[1].strip().split("\n\n")[0]
        page.text(f"`{name}`: " + " ".join(theory.split()))
    page.section("What this does not show")
    page.text("Models are small and trainings short: a score below 1 says that this budget was not enough, not that "
              "the architecture cannot. What does say something about architectures is a score at chance where others "
              "of the same budget are at 1, above all beyond the trained length. Every model got the same learning "
              "rates to try; a model whose best is the lowest or highest of them may do better elsewhere.")
    page.section("How it was made")
    page.facts(settings)
    return page.save(out / "tasks.html")
