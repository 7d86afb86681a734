"""All that decides the numbers of a training run."""

import dataclasses
from typing import Self

from archlab.layers.config import Config, require
from archlab.model import LanguageModel
from archlab.training.optimizers import Optimizer

# What of an optimizer the learning rates of the steps follow from.
SCHEDULE = ("learning_rate", "schedule", "warmup", "decay", "floor")


class Run(Config):
    """All that decides the numbers of a run.

    data, tokenizer: as `load_corpus` and `tokenizer_from` take them. batch: rows a step, of `context` tokens each, over
    all devices. accumulate: micro-batches a step. seed: of the weights, the order of the data and the training form.
    """

    model: LanguageModel
    steps: int
    batch: int
    context: int
    data: str = "stdlib"
    tokenizer: str = "bytes"
    seed: int = 0
    accumulate: int = 1
    optimizer: Optimizer = Optimizer()

    def __post_init__(self):
        for field in ("steps", "batch", "context", "accumulate"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")
        require(self.seed >= 0, self, "seed", "must be 0 or more")
        require(self.batch % self.accumulate == 0, self, "accumulate", f"must divide the batch of {self.batch} rows")

    @property
    def tokens(self) -> int:
        """How many tokens it reads."""
        return self.steps * self.batch * self.context

    @property
    def unscheduled(self) -> Self:
        """The same but for its schedule: one step, and the default learning rates."""
        default = {field: getattr(Optimizer(), field) for field in SCHEDULE}
        return dataclasses.replace(self, steps=1, optimizer=dataclasses.replace(self.optimizer, **default))

    @property
    def branches_at(self) -> int:
        """After how many steps a longer run of the same schedule "wsd" may go on from this one: where its learning rate
        begins to fall. 0 with any other schedule."""
        return self.optimizer.falls_from(self.steps) if self.optimizer.schedule == "wsd" else 0
