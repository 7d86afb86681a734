"""Many short runs of one model: compiled once, for all learning rates and seeds.

The rate and the seed are inputs of the programs, not parts of them: a trial costs its steps and nothing else.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from archlab.data.batches import Batch
from archlab.data.tasks import Task, task_batches, test_batches
from archlab.model import LanguageModel
from archlab.training.accuracy import Score, make_score_step, score
from archlab.training.optimizers import Optimizer
from archlab.training.step import make_create, make_train_step, parameters

EVERY = 50  # steps between looks at the loss, which wait for the device


@dataclasses.dataclass(frozen=True)
class Fit:
    """Trained weights. seconds: of training. steps: taken, fewer than asked for where the loss was no longer finite
    (`diverged`)."""

    params: dict[str, jax.Array]
    rest: dict[str, jax.Array]
    seconds: float
    steps: int
    diverged: bool


@dataclasses.dataclass(frozen=True)
class Trial(Fit):
    """A finished run. validation: on the task itself."""

    validation: Score


class Fits:
    """Trainings of one model, all of `steps` steps."""

    def __init__(self, model: LanguageModel, steps: int, optimizer: Optimizer = Optimizer()):
        """optimizer: its learning rate is left to the trainings."""
        self.model, self.steps, self.optimizer = model, steps, optimizer
        transform = optimizer.build(parameters(model))
        self.structure, self._begin, _ = make_create(model, transform)
        self._step = make_train_step(self.structure, transform, np.ones(model.vocab, np.int32))

    def fit(self, rate: float, seed: int, batches: Iterator[Batch],
            show: Callable[[int, float], None] | None = None) -> Fit:
        """Trains from `seed` (of the weights) at `rate`, on batches of one shape. show: is told step and loss from time
        to time."""
        state = self._begin(seed)
        rates = dataclasses.replace(self.optimizer, learning_rate=rate).rate(self.steps)
        began, step, loss = time.perf_counter(), 0, math.nan
        while step < self.steps:
            state, metrics = self._step(state, next(batches), np.float32(rates(step)))
            step += 1
            if step % EVERY == 0 or step == self.steps:
                loss = float(metrics["loss"])
                if show:
                    show(step, loss)
                if not math.isfinite(loss):
                    break
        return Fit(state.params, state.rest, time.perf_counter() - began, step, not math.isfinite(loss))


class Trials(Fits):
    """The runs of one model on one task, all of `steps` steps of `batch` rows."""

    def __init__(self, model: LanguageModel, task: Task, steps: int, batch: int, optimizer: Optimizer = Optimizer()):
        """optimizer: as in `Fits`."""
        if task.vocab > model.vocab:
            raise ValueError(f"the task has {task.vocab} symbols, more than the model's vocab = {model.vocab}")
        super().__init__(model, steps, optimizer)
        self.task, self.batch = task, batch
        self._score = make_score_step(self.structure)

    def run(self, rate: float, seed: int, rows: int = 512, show: Callable[[int, float], None] | None = None) -> Trial:
        """Trains from `seed` (of the weights and of the rows) at `rate` and validates on `rows` rows. show: as in
        `Fits.fit`."""
        fit = self.fit(rate, seed, task_batches(self.task, self.batch, seed), show)
        return Trial(**vars(fit), validation=self.test(fit.params, fit.rest, self.task, rows, split="validation"))

    def test(self, params, rest, task: Task, rows: int, split: str = "test") -> Score:
        """The score on rows of a task, as many at a time as a training batch has tokens; rows are rounded up."""
        together = max(1, min(rows, self.batch * self.task.context // task.context))
        return score(self._score, params, rest, test_batches(task, together, -(-rows // together) * together, split))
