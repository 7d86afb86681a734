"""A comparison of architectures as a table, a CSV file, figures and a page.

Rows come from finished runs: `runs[name]` lists one dict per seed, with the figures of the run and its `history`.
"""

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from archlab.analysis import plots
from archlab.analysis.accounts import Profile, short
from archlab.analysis.inside import Inside
from archlab.analysis.report import Report

CONTEXTS = (1024, 4096, 32768)
AHEAD = {"look_ahead_bits": "with look-ahead (leaky)", "routing_agreement": "routings agree"}


class Measure(NamedTuple):
    """What is compared, lowest first: the key in rows and tables, and how it is called. Histories have it under the
    key of text, whose bytes a task's answers stand for."""

    key: str = "validation_bits_per_byte"
    label: str = "bits per byte"
    short: str = "bits/byte"


TEXT, TASK = Measure(), Measure("validation_bits_per_answer", "bits per answer", "bits/answer")


def measure_of(rows: Sequence[dict]) -> Measure:
    """What was measured in these rows, of runs or of a table."""
    return TASK if TASK.key in rows[0] else TEXT


def summarise(runs: Mapping[str, Sequence[dict]], profiles: Mapping[str, Profile]) -> list[dict]:
    """A row per architecture: its size and cost, the mean over seeds of what was measured and the spread (sample
    standard deviation; None for one seed). Of runs on a task, their accuracy too. Of models whose training form looks
    ahead: look_ahead_bits, what was measured under that routing, and routing_agreement, how many tokens it sends as
    deep as the causal one (None where no layer has a depth)."""
    table = []
    for name, rows in runs.items():
        mean = lambda key: statistics.fmean(row[key] for row in rows)
        measure, p = measure_of(rows).key, profiles[name].parameters
        losses = [row[measure] for row in rows]
        accuracy = {key: mean(key) for key in ("validation_accuracy",) if key in rows[0]}
        table.append({
            "model": name, "seeds": len(rows), "learning_rate": rows[0]["learning_rate"],
            "parameters_total": p.total, "parameters_active": p.active, "parameters_unique": p.unique,
            "parameters_applied": p.applied, "parameters_embedding": p.embedding,
            "flops_per_token": profiles[name].training.total, "training_flops": mean("training_flops"),
            "tokens": rows[0]["tokens"], **accuracy, measure: statistics.fmean(losses),
            "spread": statistics.stdev(losses) if len(losses) > 1 else None,
            **{key: None if rows[0].get(key) is None else mean(key) for key in AHEAD},
            "training_seconds": statistics.fmean(row["history"][-1]["seconds"] for row in rows),
            **{key: mean(key) for key in ("train_tokens_per_second", "compile_seconds", "first_token_seconds",
                                          "decode_tokens_per_second")},
            **{f"state_bytes_{context // 1024}k": rows[0]["state_bytes"][str(context)] for context in CONTEXTS},
        })
    return table


def write_csv(path: Path, table: Sequence[dict]) -> None:
    """Writes rows of equal keys; None becomes an empty cell."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def as_text(table: Sequence[dict]) -> str:
    """The table for a terminal, best first."""
    from rich.console import Console
    from rich.table import Table

    shown, measure = Table(box=None, pad_edge=False, header_style="bold"), measure_of(table)
    accuracy = ("accuracy",) if measure is TASK else ()
    for i, column in enumerate(("model", *accuracy, measure.short, "spread", "parameters", "active", "tokens",
                                "seconds", "train tok/s", "decode tok/s", "state at 4k")):
        shown.add_column(column, justify="right" if i else "left")
    for row in sorted(table, key=lambda row: row[measure.key]):
        spread = "" if row["spread"] is None else f"±{row['spread']:.3f}"
        accuracy = (f"{row['validation_accuracy']:.3f}",) if measure is TASK else ()
        shown.add_row(row["model"], *accuracy, f"{row[measure.key]:.3f}", spread, short(row["parameters_total"]),
                      short(row["parameters_active"]), short(row["tokens"]), f"{row['training_seconds']:.0f}",
                      short(row["train_tokens_per_second"]), f"{row['decode_tokens_per_second']:.0f}",
                      short(row["state_bytes_4k"]) + "B")
    console = Console(width=160)
    with console.capture() as captured:
        console.print(shown)
    return captured.get().rstrip()


def figures(runs: Mapping[str, Sequence[dict]], table: Sequence[dict], inside: Mapping[str, Inside]) -> dict:
    """File name -> (figure, caption)."""
    colours = plots.palette(runs)
    per_token = {row["model"]: row["flops_per_token"] for row in table}

    def curves(x):
        points = {name: [[(x(name, h), h["validation_bits_per_byte"]) for h in row["history"]
                          if "validation_bits_per_byte" in h] for row in rows] for name, rows in runs.items()}
        return {name: [tuple(np.array(run).T) for run in rows] for name, rows in points.items()}

    measure = measure_of(table)
    loss = f"validation {measure.label}"
    by = {row["model"]: row for row in table}
    made = {
        "loss_by_flops": (plots.lines(curves(lambda name, h: h["tokens"] * per_token[name]), colours,
                                      "Loss for compute", "training FLOPs", loss, settle=0.3),
                          "The same operations for every model; each line is a seed."),
        "loss_by_tokens": (plots.lines(curves(lambda name, h: h["tokens"]), colours, "Loss for data", "tokens", loss,
                                       settle=0.2), "All read the same text in the same order."),
        "loss_by_seconds": (plots.lines(curves(lambda name, h: h["seconds"]), colours, "Loss for time",
                                        "seconds of training", loss, settle=0.2),
                            "Compilation and evaluation left out; times are of this machine."),
        "loss_by_decode_speed": (plots.scatter({name: (row["decode_tokens_per_second"], row[measure.key])
                                                for name, row in by.items()}, colours, "Quality against speed",
                                               "decode tokens per second, batch 1", loss),
                                 "Right and low is better."),
        "state_by_context": (plots.lines({name: [(CONTEXTS, [row[f"state_bytes_{c // 1024}k"] for c in CONTEXTS])]
                                          for name, row in by.items()}, colours, "Memory for context",
                                         "tokens of context", "bytes of state per text", log="xy"),
                             "What is kept between tokens when one text is generated."),
    }
    for name, view in inside.items():
        if view.load is not None:
            made[f"expert_load_{name}"] = (plots.heatmap(view.load, f"Expert load: {name}", rows=view.layers),
                                           "Share of the choices on validation text; 1 is an equal share.")
    return made


def write_report(out: Path, runs: Mapping[str, Sequence[dict]], table: Sequence[dict], inside: Mapping[str, Inside],
                 tokenizer, title: str, settings: Mapping[str, object]) -> Path:
    """Writes report.html and the figures as PNG into `out`; returns the page's path."""
    drawn = figures(runs, table, inside)
    for file, (figure, _) in drawn.items():
        plots.save(figure, out / f"{file}.png")
    measure = measure_of(table)
    ranked = sorted(table, key=lambda row: row[measure.key])
    best, seeds = ranked[0], table[0]["seeds"]
    equal = "training FLOPs" if settings["match"] == "flops" else "active parameters and tokens"
    page = Report(title, f"{len(table)} architectures on {settings['corpus']}, equal {equal}")
    page.facts({f"lowest {measure.label}": f"{best[measure.key]:.3f}", "by": best["model"],
                "training FLOPs a run": short(best["training_flops"]), "seeds": seeds})
    page.section("Result")
    accuracy = {"validation_accuracy": "accuracy"} if measure is TASK else {}
    ahead = {key: label for key, label in AHEAD.items() if any(row[key] is not None for row in table)}
    columns = {"model": "model", **accuracy, measure.key: measure.label, "spread": "spread", **ahead,
               "parameters_total": "parameters", "parameters_active": "active", "tokens": "tokens",
               "flops_per_token": "FLOPs per token", "training_seconds": "seconds",
               "train_tokens_per_second": "train tokens/s", "first_token_seconds": "first token, s",
               "decode_tokens_per_second": "decode tokens/s", "state_bytes_4k": "state at 4k, B",
               "learning_rate": "learning rate"}
    page.table(list(columns.values()), [[row[key] for key in columns] for row in ranked],
               "Lowest loss first. `results.csv` has every figure, `runs.csv` every run.",
               {measure.label: ".3f", "accuracy": ".3f", "spread": ".3f", "first token, s": ".3f",
                "learning rate": ".1e", AHEAD["look_ahead_bits"]: ".3f", AHEAD["routing_agreement"]: ".1%"},
               plots.palette(runs))
    page.text(verdict(ranked))
    if ahead:
        page.text("Some of these models are trained by a routing that looks at later tokens, which leaks and is no way "
                  "to generate. What ranks them is their loss under causal routing; that of the other, and the share "
                  "of tokens that both send equally deep, stand beside it.")
    page.section("Curves")
    page.figures([pair for file, pair in drawn.items() if not file.startswith("expert_load")])
    page.section("A look inside")
    loads = [pair for file, pair in drawn.items() if file.startswith("expert_load")]
    if loads:
        page.figures(loads)
    for name, view in inside.items():
        pieces = [tokenizer.decode([i]) for i in view.ids]
        for label, values in view.per_token.items():
            page.coloured(pieces, values, f"{name}: {label}")
    page.section("What this does not show")
    page.text(_caveats(settings, seeds))
    page.section("How it was made")
    page.facts(settings)
    return page.save(out / "report.html")


def verdict(ranked: Sequence[dict]) -> str:
    """Words about a table sorted by loss: what may be said of the first two, and what may not."""
    if len(ranked) < 2:
        return f"`{ranked[0]['model']}` was trained alone: nothing is compared."
    (first, second), measure = ranked[:2], measure_of(ranked)
    gap = second[measure.key] - first[measure.key]
    words = f"`{first['model']}` has the lowest loss, {gap:.3f} {measure.label} below `{second['model']}`."
    if first["spread"] is None:
        return f"{words} With one seed there is no telling whether that would happen again."
    error = (first["spread"] ** 2 / first["seeds"] + second["spread"] ** 2 / second["seeds"]) ** 0.5
    if gap < 2 * error:
        return f"{words} That is within two standard errors ({2 * error:.3f}): the two are not distinguishable here."
    return f"{words} That is {gap / max(error, 1e-9):.1f} standard errors over {first['seeds']} seeds."


def _caveats(settings: Mapping[str, object], seeds: int) -> str:
    words = ("These models have one or two million parameters and read less than a million bytes. What wins here may "
             "lose at a thousand times the size: sparse and recurrent families are known to gain from scale, and a law "
             "is fitted by several sizes and budgets, not by one.\n\n"
             "Times are of one machine under whatever else it was doing; compare them within this page only. "
             "FLOPs count matrix products and elementwise work alike, as the program has them.")
    if settings["learning-rate trials"] == 1:
        words += ("\n\nEach family ran at one learning rate, tuned once at this size; a different budget "
                  "moves the best rate, and not equally for all.")
    if seeds == 1:
        words += "\n\nThere is one seed: small gaps mean nothing. `--preset=hour` runs three, with trials of the rate."
    return words
