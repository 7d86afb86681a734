"""State tracking: automata that a network must run one token after another, and at lengths that it was not trained on.

What a layer's transition can do decides. With decays in [0, 1] (Mamba, linear attention, RetNet, mLSTM, RG-LRU) no
finite precision counts modulo 2 at all lengths; eigenvalues in [-1, 1] give parity, products of reflections (the delta
rule) permutations, and a non-linear recurrence (sLSTM) any automaton (Merrill et al. 2024, arXiv:2404.08819; Grazzi et
al. 2024, arXiv:2411.12537; Deletang et al. 2022, arXiv:2207.02098). Attention of constant depth cannot, and learns
shortcuts that end with the lengths it has seen.

Accuracies are told scaled, (accuracy - chance) / (1 - chance): 0 is guessing, 1 is the automaton.
"""

import dataclasses
import functools
import itertools

import numpy as np

from archlab.data.tasks.task import Draws, Task, as_batch
from archlab.layers.config import near, require

FACTORS = (1, 2, 4, 6)  # the lengths of the tests, in lengths of training


class Tracking(Task):
    """Base of these tasks. Rows have `shortest` to `length` inputs and end in padding.

    every: the answer so far is asked for at each input (where a beginning has an answer of its own), which is easier to
    learn and no easier to extrapolate; else at the end only, as a test does: rows of one length, scored at their end.
    """

    shortest: int = 3
    length: int = 40
    every: bool = False

    def __post_init__(self):
        require(self.shortest >= 1, self, "shortest", "must be at least 1")
        require(self.length >= self.shortest, self, "length", f"must be at least shortest = {self.shortest}")

    @property
    def context(self) -> int:
        return self.length

    def tests(self) -> dict[str, Task]:
        return {str(n): dataclasses.replace(self, shortest=n, length=n) for n in (f * self.length for f in FACTORS)}

    def sizes(self, draws: Draws) -> np.ndarray:
        """How many inputs each row has, [B]."""
        return self.shortest + draws.below(self.length + 1 - self.shortest)

    def scored(self, sizes: np.ndarray, training: bool) -> np.ndarray:
        """Where an answer is asked for, [B, length]."""
        last = np.arange(self.length) == sizes[:, None] - 1
        return np.ones_like(last) if self.every and training else last


class Parity(Tracking):
    """Is the number of ones odd? (Deletang et al. 2022; settings of Beck et al. 2024, xLSTM, arXiv:2405.04517.)

        1 0 1 1      at the end: 1      (with `every`: 1 1 0 1)

    Published: 3 to 40 bits, tested on 40 to 256; 2 layers of width 64, batch 256, rate 1e-3, 20k steps. Chance: 1/2.

    Theory: the smallest task that tells transitions apart. Attention and every recurrence with decays in [0, 1] stay at
    chance beyond the lengths of training (published, scaled: attention 0.02, mLSTM 0.09, Mamba 0.00); Mamba with
    eigenvalues in [-1, 1], the delta rule with beta in (0, 2), RWKV-7 and sLSTM are at 1.
    """

    @property
    def vocab(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 1 / 2

    def make(self, draws: Draws, training: bool):
        sizes, bits = self.sizes(draws), draws.below(2, self.length)
        return as_batch(bits, np.cumsum(bits, 1) % 2, self.scored(sizes, training), sizes)


class ModularArithmetic(Tracking):
    """The value of an expression modulo `modulus` (Deletang et al. 2022, arXiv:2207.02098, tables A.2 and A.3).

        2 + 3 * 4 - 1 =      at the end: (2 + 12 - 1) mod 5 = 3
        ( ( - 2 ) * ( 3 + 4 ) ) =      with brackets

    Digits 0 to modulus - 1, then + - * = ( ). Without brackets the product binds first, and lengths are rounded down to
    a number of inputs that an expression can have (even, with the =). Published: modulus 5, training to 40. Chance:
    1 / modulus (answers of products are more often 0: the likeliest is right in up to 0.3).

    Theory: without brackets it is a regular language: the delta rule with negative eigenvalues comes near (published,
    scaled: 0.97), sLSTM too (0.79), attention and Mamba do not (0.03, 0.10). Brackets need a stack: no finite state
    solves all lengths (0.07 to 0.26).
    """

    modulus: int = 5
    brackets: bool = False

    def __post_init__(self):
        super().__post_init__()
        require(self.modulus >= 2, self, "modulus", "must be at least 2")
        require(not self.every, self, "every", "must be False: the beginning of an expression has no value")
        require(self.shortest >= 2, self, "shortest", "must be at least 2, a digit and =")

    @property
    def vocab(self) -> int:
        return self.modulus + 6

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def make(self, draws: Draws, training: bool):
        sizes = self.sizes(draws)
        if self.brackets:
            ids, answers = self._with_brackets(draws, sizes)
        else:
            sizes -= sizes % 2
            ids, answers = self._without(draws, sizes)
        ids[np.arange(draws.rows), sizes - 1] = self.modulus + 3
        return as_batch(ids, np.broadcast_to(answers[:, None], ids.shape), self.scored(sizes, training), sizes)

    def _without(self, draws: Draws, sizes: np.ndarray):
        """Expressions, read once: `total` holds the finished terms, `term` the product so far with its sign."""
        digits = draws.below(self.modulus, (self.length + 1) // 2)
        signs = draws.below(3, self.length // 2)
        ids = np.zeros((draws.rows, self.length), int)
        ids[:, 0::2], ids[:, 1::2] = digits, self.modulus + signs
        total, term, answers = 0 * sizes, digits[:, 0], digits[:, 0].copy()
        for i in range(1, self.length // 2):
            sign, digit = signs[:, i - 1], digits[:, i]
            product = sign == 2
            total = np.where(product, total, (total + term) % self.modulus)
            term = np.where(product, term * digit, np.where(sign == 1, -digit, digit)) % self.modulus
            answers = np.where(2 * i + 2 <= sizes, (total + term) % self.modulus, answers)
        return ids, answers

    def _with_brackets(self, draws: Draws, sizes: np.ndarray):
        """A grammar, row by row: it splits its length at random until single digits are left."""
        ids, answers = np.zeros((draws.rows, self.length), int), 0 * sizes
        for row, (rng, size) in enumerate(zip(draws.generators(), sizes)):
            ids[row, :size - 1], answers[row] = _expression(rng, size - 1, self.modulus)
        return ids, answers


def _expression(rng: np.random.Generator, length: int, modulus: int) -> tuple[list[int], int]:
    """Tokens and value of a random expression of `length` tokens, in which every operation has its brackets."""
    plus, minus, _, _, opening, closing = range(modulus, modulus + 6)
    if length <= 2:
        digit = int(rng.integers(modulus))
        return ([digit], digit) if length == 1 else ([minus, digit], -digit % modulus)
    if length <= 4:
        inner, value = _expression(rng, length - 2, modulus)
        return [opening, *inner, closing], value
    first = int(rng.integers(1, length - 3))
    (left, a), (right, b) = _expression(rng, first, modulus), _expression(rng, length - 3 - first, modulus)
    sign = int(rng.integers(3))
    return [opening, *left, plus + sign, *right, closing], (a + b, a - b, a * b)[sign] % modulus


class WordProblem(Tracking):
    """The product of a group's elements, so far (Merrill et al. 2024, arXiv:2404.08819, section 5).

        g1 g2 g3      at each: g1, g1 g2, g1 g2 g3 (first g1, then g2 ... applied)

    group: "S5" (120 elements), "A5" (60), or "Z" and a number, such as "Z60": the same size without the difficulty.
    Parity is S2 = Z2. Chance: 1 / elements.

    Theory: S5 and A5 are not solvable, so their words are complete for NC1: beyond attention and diagonal recurrences
    of fixed depth at any length. One layer of a non-linear recurrence learns it; the delta rule needs several
    reflections a token. Z60 wants eigenvalues that are roots of unity: rotations.
    """

    length: int = 32
    every: bool = True
    group: str = "S5"

    def __post_init__(self):
        super().__post_init__()
        names = ("S5", "A5", "Z60")
        known = self.group in names or self.group[:1] == "Z" and self.group[1:].isdigit() and int(self.group[1:]) > 1
        require(known, self, "group", near(self.group, names))

    @property
    def vocab(self) -> int:
        return len(group_table(self.group))

    @property
    def chance(self) -> float:
        return 1 / self.vocab

    def make(self, draws: Draws, training: bool):
        table, sizes = group_table(self.group), self.sizes(draws)
        words = draws.below(len(table), self.length)
        products = words.copy()
        for t in range(1, self.length):
            products[:, t] = table[products[:, t - 1], words[:, t]]
        return as_batch(words, products, self.scored(sizes, training), sizes)


@functools.cache
def group_table(group: str) -> np.ndarray:
    """[E, E]: the number of the product of elements i and j: of permutations in lexical order, i applied first."""
    if group[0] == "Z":
        return np.add.outer(np.arange(int(group[1:])), np.arange(int(group[1:]))) % int(group[1:])
    found = [p for p in itertools.permutations(range(5)) if group == "S5" or _is_even(p)]
    number = {p: i for i, p in enumerate(found)}
    return np.array([[number[tuple(q[p[i]] for i in range(5))] for q in found] for p in found])


def _is_even(permutation) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0
