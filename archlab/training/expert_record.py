"""What becomes of a run's experts: their loads, kept beside the metrics, and warnings where they collapse."""

from collections.abc import Callable, Mapping

import numpy as np

from archlab.layers.traces import per_layer
from archlab.training.collapse import Watch
from archlab.training.metrics import Lines


# Of choices that found no room; of those on which expert choice and its causal rule agree; of tokens that skip a layer.
SHARES = ("dropped", "agreement", "skipped")


class ExpertRecord:
    """`add` after each step; `write` where a row of metrics is written too.

    Rows of the file: {"step", "load": {layer: [E]}, "largest_logit": {layer: x}, "starving": {layer: {expert: step in
    which it began}}}; and where experts collapse {"step", "collapse": {"layer", "path", "experts", "since", "steps"}}.
    """

    def __init__(self, lines: Lines | None, say: Callable[[str], None], steps: int):
        """Args: lines: where to write; goes on after its last row. say: takes a warning. steps: as in `Watch`."""
        self.lines, self.say, self.watch = lines, say, Watch(steps)
        self.loads, self.logits, self.shares = {}, {}, {}
        rows = [row for row in lines.rows if "load" in row] if lines else []
        for path, load in rows[-1]["load"].items() if rows else ():
            since = self.watch.since[path] = np.zeros(len(load), np.int64)
            for expert, step in rows[-1]["starving"].get(path, {}).items():
                since[int(expert)] = step  # it is taken to have starved ever since

    def add(self, step: int, traces: Mapping[str, np.ndarray]) -> None:
        """Takes a step's traces, and warns."""
        self.loads, self.logits = per_layer(traces, "load", 1), per_layer(traces, "largest_logit", 0)
        shares = {name: list(per_layer(traces, name, 0).values()) for name in SHARES}
        self.shares = {name: float(np.mean(values)) for name, values in shares.items() if values}
        for collapse in self.watch.look(step, self.loads):
            self.say(f"warning: step {step}, {collapse}")
            if self.lines:
                self.lines.write({"step": step, "collapse": collapse._asdict()})

    def broken(self) -> str:
        """Which layer is the first whose router gave logits that are not finite, in words; "" where none did."""
        for layer, (path, logit) in enumerate(self.logits.items(), 1):
            if not np.isfinite(logit):
                return f"; the first router with logits that are not finite is that of layer {layer} ({path})"
        return ""

    def write(self, step: int) -> dict[str, float]:
        """Writes the row of the step last added. Returns what belongs with the metrics, nothing without experts:
        max_violation and largest_logit, each that of the worst layer; and the means of `SHARES` over layers."""
        if not self.loads:
            return {}
        starving = {path: {str(e): int(since[e]) for e in np.flatnonzero(since)}
                    for path, since in self.watch.since.items() if since.any()}
        if self.lines:
            self.lines.write({"step": step, "load": {path: [round(float(x), 6) for x in load]
                                                     for path, load in self.loads.items()},
                              "largest_logit": {path: float(x) for path, x in self.logits.items()},
                              "starving": starving})
        worst = {"max_violation": max(float(load.max() / max(load.mean(), 1e-30)) - 1 for load in self.loads.values())}
        return worst | self.shares | ({"largest_logit": float(max(self.logits.values()))} if self.logits else {})
