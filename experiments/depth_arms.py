"""The models of `experiments.depth` at work: each is compiled once, for all its rates and seeds."""

from pathlib import Path

import jax
import numpy as np

from archlab.analysis.depths import total_depth
from archlab.data import train_batches, validation_batches
from archlab.data.tasks import test_batches
from archlab.layers.weights import merge
from archlab.training.evaluation import Evaluation, sums_over
from archlab.training.look_ahead import look_ahead, make_look_ahead_step
from archlab.training.objectives import run
from archlab.training.saving import save
from archlab.training.trials import Fits, Trials
from experiments.depth_studies import Arm, Size

TEST_ROWS = 256  # behind each accuracy
SHOWN = 4  # rows of a text whose depths are kept


class TextArm:
    """A model of text: compiled once, trained and evaluated at many rates and seeds. Of those with seed 0 what is
    better than a loss of `best` is saved into `folder`."""

    def __init__(self, arm: Arm, size: Size, corpus, tokenizer, folder: Path, best: float):
        self.arm, self.size, self.corpus, self.tokenizer = arm, size, corpus, tokenizer
        self.folder, self.best = folder, best
        self.fits = Fits(arm.model, arm.steps)
        self.held_out = validation_batches(corpus, tokenizer, size.context, size.rows, size.eval_batches)

        def evaluate(params, rest, batch):
            sums, aux = sums_over(merge(self.fits.structure, params, rest), batch, tokenizer.bytes_per_token)
            return sums, total_depth(aux.traces, batch.ids.shape)

        self.evaluate = jax.jit(evaluate)
        ahead = arm.model.body.looks_ahead
        self.look_ahead = make_look_ahead_step(arm.model, tokenizer.bytes_per_token) if ahead else None

    def run(self, rate: float, seed: int, show) -> dict:
        """The figures of one run."""
        size, arm = self.size, self.arm
        fit = self.fits.fit(rate, seed, train_batches(self.corpus, self.tokenizer, size.context, size.rows, seed), show)
        sums, depths, first = [], [], None
        for batch in self.held_out:
            found, depth = self.evaluate(fit.params, fit.rest, batch)
            sums.append([np.asarray(value, np.float64) for value in found])
            if depth is not None:
                depths.append(np.asarray(depth)[batch.segments > 0])
                first = first or _shown(batch, depth)
        evaluation = Evaluation(*(sum(values) for values in zip(*sums)))
        if seed == 0 and evaluation.loss < self.best:
            self.best = evaluation.loss
            save(merge(self.fits.structure, fit.params, fit.rest), self.folder)
        row = {"loss": evaluation.loss, "bits_per_byte": evaluation.bits_per_byte,
               "tokens": arm.steps * size.rows * size.context, "seconds": round(fit.seconds, 1),
               "diverged": fit.diverged, "depth_counts": None, "blocks": arm.always, "example": None}
        if depths:
            depths = np.concatenate(depths)
            row |= {"depth_counts": np.bincount(depths).tolist(), "example": first if seed == 0 else None,
                    "blocks": arm.always + arm.routed * float(depths.mean())}
        if self.look_ahead is not None:
            found = look_ahead(self.look_ahead, fit.params, fit.rest, self.held_out)
            row |= {"look_ahead_bits": found.ahead.bits_per_byte, "agreement": found.agreement,
                    "routers": found.routers}
        return row


class TaskArm:
    """A model of a task."""

    def __init__(self, arm: Arm, size: Size):
        self.arm, self.trials = arm, Trials(arm.model, arm.task, arm.steps, size.task_rows)
        self.halts = arm.routed > 0
        self.steps = jax.jit(lambda params, rest, batch: total_depth(
            run(merge(self.trials.structure, params, rest), batch).aux.traces, batch.ids.shape))

    def run(self, rate: float, seed: int, show) -> dict:
        """The figures of one run: accuracy at each length, and how many steps tokens took while the text was read and
        while it was answered."""
        trial = self.trials.run(rate, seed, TEST_ROWS, show)
        tests, steps, example = {}, {}, None
        for label, test in self.arm.task.tests().items():
            tests[label] = self.trials.test(trial.params, trial.rest, test, TEST_ROWS).accuracy
            if self.halts:
                batch = next(iter(test_batches(test, 16, 16)))
                taken = self.steps(trial.params, trial.rest, batch)
                answers = batch.weights > 0
                steps[label] = {"reading": float(taken[(batch.segments > 0) & ~answers].mean()),
                                "answering": float(taken[answers].mean())}
                example = example or _shown(batch, taken)
        return {"loss": trial.validation.loss, "accuracy": trial.validation.accuracy, "tests": tests,
                "steps_taken": steps, "example": example if seed == 0 else None, "seconds": round(trial.seconds, 1),
                "diverged": trial.diverged}


def _shown(batch, depth) -> dict:
    """The first rows of a batch, and how deep their tokens went."""
    return {"ids": batch.ids[:SHOWN].tolist(), "depth": depth[:SHOWN].tolist()}
