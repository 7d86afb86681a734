"""Turns what each step says into rows, one step late, so that the host never waits for the step that is running."""

import collections
import math
import statistics
import time

import jax

from archlab.training.expert_record import ExpertRecord
from archlab.training.metrics import Journal
from archlab.training.progress import Progress

WINDOW = 10  # steps over which the loss is averaged to tell divergence from a spike


class Diverged(ArithmeticError):
    """The loss or the gradient is no longer finite, or the loss has grown beyond any guess. `step`: where."""

    def __init__(self, step: int, why: str):
        super().__init__(f"diverged at step {step}: {why}; the last good checkpoint stays; try a smaller learning rate")
        self.step = step


class Recorder:
    """`add` after each step; `settle` before anything that must see the newest step; `commit` writes its row."""

    def __init__(self, *, steps: int, tokens_per_step: int, vocab: int, rate, log_every: int, seconds: float,
                 progress: Progress, journal: Journal | None, peak_tokens_per_second: float | None,
                 collapse_after: int = 100):
        self.steps, self.tokens_per_step, self.rate, self.log_every = steps, tokens_per_step, rate, log_every
        self.limit = 2 * math.log(vocab)  # twice what a uniform guess costs
        self.seconds, self.durations = seconds, []
        self.progress, self.journal, self.peak = progress, journal, peak_tokens_per_second
        self.rows = journal.rows if journal else []
        self.experts = ExpertRecord(journal and journal.experts, progress.say, collapse_after)
        self.waiting = self.row = None
        self.losses, self.learned = collections.deque(maxlen=WINDOW), False
        self.start_clock()

    def start_clock(self) -> None:
        """After a pause that is no training: evaluation, compilation, saving."""
        self.clock = time.perf_counter()

    def add(self, step: int, metrics: dict) -> None:
        """Takes the metrics of a step that has just been dispatched, and writes those of the step before."""
        self.settle()
        self.commit()
        self.waiting = (step, metrics)

    def settle(self) -> None:
        """Fetches what waits. Raises `Diverged`."""
        if self.waiting is None:
            return
        (step, metrics), self.waiting = self.waiting, None
        values = jax.device_get(metrics)
        traces = values.pop("traces", {})
        values = {name: float(value) for name, value in values.items()}
        now = time.perf_counter()
        self.durations.append(now - self.clock)
        self.seconds, self.clock = self.seconds + now - self.clock, now
        self.experts.add(step, traces)
        self._watch(step, values["loss"], values["grad_norm"])
        speed = self.tokens_per_step / statistics.median(self.durations[-self.log_every:])
        self.row = {"step": step, **values, "tokens": step * self.tokens_per_step, "seconds": round(self.seconds, 3),
                    "tokens_per_second": round(speed, 1), "learning_rate": float(self.rate(step - 1))}
        if self.peak and speed <= self.peak:  # a rate above the peak says that the peak was measured badly
            self.row["mfu"] = round(speed / self.peak, 4)

    def commit(self, **more: float) -> None:
        """Writes the fetched row, with `more` in it; a row without more only every `log_every` steps."""
        row, self.row = self.row, None
        if row is None:
            return
        row |= more
        self.progress.show(row)
        if more or row["step"] % self.log_every == 0 or row["step"] in (1, self.steps):
            row |= self.experts.write(row["step"])
            self.journal.write(row) if self.journal else self.rows.append(row)

    @property
    def tokens_per_second(self) -> float:
        """The median over the steps of this process; 0 before the first."""
        return self.tokens_per_step / statistics.median(self.durations) if self.durations else 0.0

    def _watch(self, step: int, loss: float, grad_norm: float) -> None:
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise Diverged(step, f"loss {loss}, gradient norm {grad_norm}{self.experts.broken()}")
        self.losses.append(loss)
        mean = statistics.fmean(self.losses)
        if len(self.losses) == WINDOW and mean > self.limit and self.learned:
            raise Diverged(step, f"the mean loss of {WINDOW} steps is {mean:.2f}, above {self.limit:.2f}, "
                                 "twice that of a uniform guess")
        self.learned |= mean < self.limit
