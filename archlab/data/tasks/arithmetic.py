"""Arithmetic that grows with its input: every digit of an answer takes one step, and a carry may run through all."""

import dataclasses

import numpy as np

from archlab.data.tasks.task import Draws, Task, as_batch, positive
from archlab.layers.config import require


class Addition(Task):
    """The sum of two numbers, digit by digit from the lowest (Kaiser & Sutskever 2015, Neural GPUs, arXiv:1511.08228,
    section 3; the addition of Dehghani et al. 2018, Universal Transformers, arXiv:1807.03819, table 4).

        9 1 + 3 4 = 2 6 0      at = and at each digit of the sum: its next digit (19 + 43 = 062)

    Both numbers have `shortest` to `length` digits to `base`, equally many, zeros among them; the sum has one more.
    Digits 0 to base - 1, then + and =. Rows end in padding. Tested on longer numbers. Published: 40 tokens, tested on
    400. Chance: 1 / base.

    Theory: a digit needs two digits at places that depend on the length, and a carry that may come from any lower one.
    Published, at ten times the trained length: LSTM 0.08, Transformer 0.07, Universal Transformer 0.34 of the digits.
    """

    base: int = 10
    shortest: int = 1
    length: int = 13

    def __post_init__(self):
        positive(self, "shortest")
        require(self.base >= 2, self, "base", "must be at least 2")
        require(self.length >= self.shortest, self, "length", f"must be at least shortest = {self.shortest}")

    @property
    def vocab(self) -> int:
        return self.base + 2

    @property
    def context(self) -> int:
        return 3 * self.length + 2

    @property
    def chance(self) -> float:
        return 1 / self.base

    def tests(self) -> dict[str, Task]:
        return {str(n): dataclasses.replace(self, shortest=n, length=n) for n in
                (self.length, 2 * self.length, 4 * self.length)}

    def make(self, draws: Draws, training: bool):
        size = self.shortest + draws.below(self.length + 1 - self.shortest, 1)
        terms = np.where(np.arange(self.length) < size[:, None], draws.below(self.base, 2, self.length), 0)
        total, carry = np.zeros((draws.rows, self.length + 1), int), 0
        for i in range(self.length):
            column = terms[:, :, i].sum(1) + carry
            total[:, i], carry = column % self.base, column // self.base
        total[:, self.length] = carry

        places = np.arange(3 * self.length + 3) + 0 * size
        digits = lambda number, at: np.take_along_axis(number, np.clip(at, 0, self.length), 1)
        first, second = (np.pad(terms[:, i], ((0, 0), (0, 1))) for i in range(2))
        tokens = np.where(places < size, digits(first, places), digits(second, places - size - 1))
        tokens = np.where(places > 2 * size + 1, digits(total, places - 2 * size - 2), tokens)
        tokens = np.where(places == size, self.base, np.where(places == 2 * size + 1, self.base + 1, tokens))
        return as_batch(tokens[:, :-1], tokens[:, 1:], places[:, :-1] > 2 * size, 3 * size[:, 0] + 2)
