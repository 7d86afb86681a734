"""What came of the studies of adaptive depth: a table, figures and a page.

Runs come as `{study: {arm: [row for each seed]}}`. Rows have learning_rate, seed, steps, parameters, training_flops,
loss and diverged; of text bits_per_byte, tokens, blocks (that a token passed, on average), depth_counts (tokens by how
deep they went, causally) and, of models whose training form looks ahead, look_ahead_bits, agreement and routers; of
tasks accuracy, tests {length: accuracy} and steps_taken {length: {reading, answering}}. One of them has an example.
"""

import inspect
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from archlab.analysis import plots
from archlab.analysis.comparison import write_csv
from archlab.analysis.paired import half_interval, told_apart
from archlab.analysis.report import Report

Found = Mapping[str, Mapping[str, Sequence[dict]]]
LENGTHS = ("at_trained", "at_twice", "at_four_times")
COLUMNS = {"arm": "model", "parameters": "parameters", "training_flops": "training FLOPs", "steps": "steps",
           "blocks": "blocks a token", "bits_per_byte": "bits/byte, causal", "spread": "spread",
           "look_ahead_bits": "bits/byte, look-ahead (leaky)", "agreement": "routings agree",
           "rule_accuracy": "rule right", "learning_rate": "learning rate"}
TASK_COLUMNS = {"arm": "model", "parameters": "parameters", **{
    key: label for length, times in zip(LENGTHS, ("", "2 x ", "4 x ")) for key, label in (
        (f"accuracy_{length}", f"accuracy, {times}length"), (f"spread_{length}", "spread"))},
    "learning_rate": "learning rate"}
FORMATS = {"blocks a token": ".2f", "bits/byte, causal": ".4f", "spread": ".4f", "routings agree": ".1%",
           "bits/byte, look-ahead (leaky)": ".4f", "rule right": ".1%", "learning rate": ".1e",
           **{f"accuracy, {times}length": ".3f" for times in ("", "2 x ", "4 x ")}}


def summarise(found: Found) -> list[dict]:
    """A row for each arm of each study: means over its seeds, and the sample standard deviation of what ranks it (None
    for one seed). rule_accuracy: of the causal rule before budgets, the mean over routers (but for those that let
    all pass)."""
    table = []
    for study, arm, rows in _arms(found):
        mean = lambda values: statistics.fmean(values) if values else None
        given = lambda key: [row[key] for row in rows if row.get(key) is not None]
        in_doubt = lambda row: [right for right in (row.get("routers") or {}).values() if right < 1]
        rules = [statistics.fmean(in_doubt(row)) for row in rows if in_doubt(row)]
        line = {"study": study, "arm": arm, "seeds": len(rows), "learning_rate": rows[0]["learning_rate"],
                "steps": rows[0]["steps"], "parameters": rows[0]["parameters"],
                "training_flops": rows[0]["training_flops"], "blocks": mean(given("blocks")),
                "bits_per_byte": mean(given("bits_per_byte")), "spread": _spread(given("bits_per_byte")),
                "look_ahead_bits": mean(given("look_ahead_bits")), "agreement": mean(given("agreement")),
                "rule_accuracy": mean(rules), "diverged": sum(row["diverged"] for row in rows)}
        tests = list(rows[0].get("tests", ()))
        for i, length in enumerate(LENGTHS):
            right = [row["tests"][tests[i]] for row in rows] if tests else []
            steps = [row["steps_taken"][tests[i]] for row in rows if row["steps_taken"]] if tests else []
            line |= {f"accuracy_{length}": mean(right), f"spread_{length}": _spread(right),
                     **{f"steps_{when}_{length}": mean([taken[when] for taken in steps])
                        for when in ("reading", "answering")}}
        table.append(line)
    return table


def verdicts(rows: Mapping[str, Sequence[dict]], claims: Sequence[tuple[str, str]]) -> list[str]:
    """What held of each claim (better, worse), in words: by bits per byte, or by wrong answers at the longest test. Of
    one seed, and of arms that did not run, nothing is said."""
    lines = []
    for better, worse in claims:
        both = {row["seed"]: row for row in rows.get(better, ())}, {row["seed"]: row for row in rows.get(worse, ())}
        seeds = sorted(both[0].keys() & both[1].keys())
        if len(seeds) > 1:
            gaps = [_error(both[1][seed]) - _error(both[0][seed]) for seed in seeds]
            label = next(iter(both[0].values()))
            unit = f"of the answers at {list(label['tests'])[-1]}" if label.get("tests") else "bits/byte"
            lines.append(told_apart(better, worse, gaps, unit))
    return lines


def as_text(table: Sequence[dict]) -> str:
    """The table for a terminal."""
    of = lambda value, form: f"{'–' if value is None else format(value, form):>11}"
    heads = ("bits/byte", "spread", "look-ahead", "agree", "rule right", "accuracy", "2 x", "4 x")
    lines = [f"{'':<3}{'':<34}" + "".join(f"{head:>11}" for head in heads)]
    for row in table:
        cells = [of(row["bits_per_byte"], ".4f"), of(row["spread"], ".4f"), of(row["look_ahead_bits"], ".4f"),
                 of(row["agreement"], ".1%"), of(row["rule_accuracy"], ".1%")]
        lines.append(f"{row['study']:<3}{row['arm']:<34}" + "".join(cells)
                     + "".join(of(row[f"accuracy_{length}"], ".3f") for length in LENGTHS))
    return "\n".join(lines)


def figures(found: Found, table: Sequence[dict], speed: Sequence[dict]) -> dict:
    """File name -> (figure, caption)."""
    made = {}
    for study, arms in found.items():
        text = {arm: rows for arm, rows in arms.items() if "tests" not in rows[0]}
        if text:
            values = {arm: [row["bits_per_byte"] for row in rows] for arm, rows in text.items()}
            made[f"{study}_loss"] = (plots.intervals(
                {"Loss": [(arm, bits, _half(bits)) for arm, bits in values.items()]}, "bits per byte, causal"),
                "Each dot is a seed, the line their mean; the bar is a 95% interval of it.")
        made |= _shares(study, text) | _by_length(study, {arm: arms[arm] for arm in arms if arm not in text})
    points = {row["arm"]: (row["blocks"], row["bits_per_byte"]) for row in table
              if row["study"] in "ade" and row["bits_per_byte"] is not None}
    if points:
        made["loss_by_depth"] = (plots.scatter(points, plots.palette(points), "Loss for depth", "blocks a token passes",
                                               "bits per byte, causal", log=""),
                                 "Of (a), (d) and (e): the mean over tokens of how many blocks each went through when "
                                 "routing is causal. Numbers of weights and of steps differ.")
    made |= _pareto(table, speed)
    return made


def write_page(out: Path, found: Found, table: Sequence[dict], told: Mapping[str, tuple], speed: Sequence[dict],
               settings: Mapping[str, object]) -> Path:
    """Writes results.csv, the figures as PNG and depth.html into `out`; returns the page's path.

    Args: told: study -> (words about it, whose first line is a heading and a colon; its claims). speed: rows of a
      measurement of speed and memory, shown as they are; those with `model` and `decode_tokens_per_second` are drawn.
    """
    write_csv(out / "results.csv", table)
    drawn = figures(found, table, speed)
    for file, (figure, _) in drawn.items():
        plots.save(figure, out / f"{file}.png")
    page = Report("What adaptive depth is worth", "Recursion, routing over depth and halting, against fixed depth")
    page.text("A router that takes the best of a row's tokens looks ahead: whether a token is among the best depends "
              "on later ones. That is how it is trained, and no way to generate. So there are three numbers: the loss "
              "under that routing, which leaks; the loss under causal routing, by which all models here are ranked; "
              "and the share of tokens that both send equally deep.")
    for study, arms in found.items():
        if arms:
            words, claims = told[study]
            _study(page, study, arms, [row for row in table if row["study"] == study], inspect.cleandoc(words), claims,
                   [pair for file, pair in drawn.items() if file.startswith(f"{study}_")])
    page.section("Depth and speed")
    page.figures([drawn[file] for file in drawn if file.startswith(("loss_by", "pareto"))])
    if speed:
        columns = list(dict.fromkeys(key for row in speed for key in row))
        page.table([key.replace("_", " ") for key in columns], [[row.get(key) for key in columns] for row in speed],
                   "Throughput and memory of the same models, as `speed.json` has them.")
    else:
        page.text("Throughput and the bytes of caches are measured apart. Where that has left a `speed.json` in this "
                  "folder, its table stands here, and loss against decoding speed.")
    page.section("How deep each token went")
    _examples(page, found)
    page.section("What this does not show")
    page.text("These models have less than a million parameters and read a few hundred thousand bytes. The published "
              "effects are of hundredths of a nat, at a hundred million parameters and ten billion tokens; here the "
              "spread over seeds is often as large, and what is not told apart may well differ at scale.\n\n"
              "A rule that never lets a token pass is right about 87.5% of them at a capacity of 12.5%: the accuracy "
              "of a rule counts from there on.")
    page.section("How it was made")
    page.facts(settings)
    return page.save(out / "depth.html")


def _study(page: Report, study: str, arms: Mapping[str, Sequence[dict]], table: Sequence[dict], words: str,
           claims: Sequence[tuple[str, str]], pairs: Sequence[tuple]) -> None:
    heading, _, rest = words.partition(":")
    page.section(f"({study}) {heading}")
    page.text(rest.strip()[:1].upper() + rest.strip()[1:])
    for columns, rows in ((COLUMNS, [row for row in table if row["bits_per_byte"] is not None]),
                          (TASK_COLUMNS, [row for row in table if row["bits_per_byte"] is None])):
        shown = {key: label for key, label in columns.items() if any(row[key] is not None for row in rows)}
        if rows:
            page.table(list(shown.values()), [[row[key] for key in shown] for row in rows],
                       f"Means over {rows[0]['seeds']} seeds; spread is their standard deviation.", FORMATS)
    for line in verdicts(arms, claims):
        page.text(line + ".")
    if pairs:
        page.figures(pairs)


def _shares(study: str, arms: Mapping[str, Sequence[dict]]) -> dict:
    """The histogram of depths of each arm that has several."""
    deep = {arm: np.sum([np.pad(row["depth_counts"], (0, 64 - len(row["depth_counts"]))) for row in rows], 0)
            for arm, rows in arms.items() if rows[0]["depth_counts"]}
    if not deep:
        return {}
    counts = np.stack(list(deep.values()))
    counts = counts[:, :np.flatnonzero(counts.any(0)).max() + 1]
    return {f"{study}_depths": (
        plots.matrix(counts / counts.sum(1, keepdims=True), "How deep tokens go", "depth", "", "share of tokens", 1.0,
                     rows=list(deep)),
        "Validation tokens by how many recursions they took, or how many routed blocks they passed, causally.")}


def _by_length(study: str, arms: Mapping[str, Sequence[dict]]) -> dict:
    """Of tasks: accuracy by length, and steps by length. Arms are named "task: model"."""
    made = {}
    for task in dict.fromkeys(arm.split(": ")[0] for arm in arms):
        mine = {arm.split(": ")[1]: rows for arm, rows in arms.items() if arm.startswith(f"{task}: ")}
        points = lambda row, of: tuple(np.array([(float(n), of(value)) for n, value in row.items()]).T)
        curves = {name: [points(row["tests"], float) for row in rows] for name, rows in mine.items()}
        made[f"{study}_{task}"] = (
            plots.lines(curves, plots.palette(curves), f"Beyond the trained length: {task}", "letters or digits",
                        "accuracy", log="x", settle=0), "The shortest is the longest trained; each line is a seed.")
        taken = {when: [points(row["steps_taken"], lambda steps, when=when: steps[when]) for rows in mine.values()
                        for row in rows if row["steps_taken"]] for when in ("reading", "answering")}
        if taken["reading"]:
            made[f"{study}_{task}_steps"] = (
                plots.lines(taken, plots.palette(taken), f"Steps before halting: {task}", "letters or digits", "steps",
                            log="x", settle=0),
                "Of the Universal Transformer with ACT: the mean over tokens that are read, and over those from which "
                "the answer is told.")
    return made


def _pareto(table: Sequence[dict], speed: Sequence[dict]) -> dict:
    """Loss against decoding speed, for each size of a batch."""
    bits = {row["arm"]: row["bits_per_byte"] for row in table if row["bits_per_byte"] is not None}
    made = {}
    for batch in dict.fromkeys(row.get("batch", 1) for row in speed):
        points = {row["model"]: (row["decode_tokens_per_second"], bits[row["model"]]) for row in speed
                  if row.get("batch", 1) == batch and row.get("model") in bits and row.get("decode_tokens_per_second")}
        if points:
            made[f"pareto_{batch}"] = (plots.scatter(points, plots.palette(bits), f"Quality for speed, batch {batch}",
                                                     "decode tokens per second", "bits per byte, causal"),
                                       "Right and low is better.")
    return made


def _examples(page: Report, found: Found) -> None:
    """Texts with their tokens coloured by depth, each model once."""
    seen = set()
    for study, arm, rows in _arms(found):
        example = rows[0].get("example")
        if not example or rows[0]["digest"] in seen:
            continue
        seen.add(rows[0]["digest"])
        pieces, values, task = [], [], arm.split(": ")[0] if "tests" in rows[0] else None
        for ids, depth in zip(example["ids"], example["depth"]):
            # Symbols of the tasks are digits, then their marks; rows of a text go on from one another.
            pieces += [chr(i) if i >= 32 or i in (9, 10) else "·" for i in ids] if task is None else [
                ("0123456789+=" if task == "addition" else "0123456789|")[i] for i in ids] + ["\n"]
            values += depth + ([] if task is None else [math.nan])
        page.coloured(pieces, values, f"({study}) {arm}: depth")


def _arms(found: Found) -> Iterator[tuple[str, str, Sequence[dict]]]:
    return ((study, arm, rows) for study, arms in found.items() for arm, rows in arms.items())


def _error(row: dict) -> float:
    return 1 - list(row["tests"].values())[-1] if row.get("tests") else row["bits_per_byte"]


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _half(values: Sequence[float]) -> float:
    half = half_interval(values)
    return half if math.isfinite(half) else 0.0
