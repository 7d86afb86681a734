"""Tasks in symbols or bytes as a reader would write them: nested lists, a phone book, a needle in a haystack."""

import dataclasses

import numpy as np

from archlab.data.tasks.task import Draws, Task, as_batch, next_tokens, positive
from archlab.layers.config import require

OPERATORS = {10: np.min, 11: np.max, 12: np.median, 13: lambda values: np.sum(values) % 10}
TRIES = 10_000  # lists drawn before a length is called out of reach


class ListOps(Task):
    """Nested operations on lists of digits (Nangia & Bowman 2018, arXiv:1804.06028; as in Tay et al. 2020, "Long Range
    Arena", arXiv:2011.04006).

        [MAX 2 9 [MIN 4 7 ] 0 ]      at the end: 9

    Digits 0 to 9, then [MIN [MAX [MED (the median, rounded down) [SM (the sum modulo 10), and ] = 14. A place holds a
    list with the chance 1/4, of 2 to `arguments` places, down to `depth`. Rows of `shortest` to `length` tokens end in
    padding. Published: 500 to 2000 tokens, depth 10, 10 arguments. Chance: 1/10; the likeliest answer (9 and 0 are
    frequent) is right in about 0.17.

    Theory: a stack of depth 10: attention reaches 0.36 as published, linear attention 0.16; S4 0.6.
    """

    shortest: int = 500
    length: int = 2000
    depth: int = 10
    arguments: int = 10

    def __post_init__(self):
        positive(self, "depth")
        require(self.arguments >= 2, self, "arguments", "must be at least 2")
        require(4 <= self.shortest <= self.length, self, "shortest", f"must be from 4 to length = {self.length}")

    @property
    def vocab(self) -> int:
        return 15

    @property
    def context(self) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return 1 / 10

    def tests(self) -> dict[str, Task]:
        longer = dataclasses.replace(self, shortest=self.length, length=2 * self.length)
        return {f"{task.shortest} to {task.length}": task for task in (self, longer)}

    def make(self, draws: Draws, training: bool):
        ids, targets = (np.zeros((draws.rows, self.length), int) for _ in range(2))
        sizes = np.zeros(draws.rows, int)
        for row, rng in enumerate(draws.generators()):  # a grammar: row by row
            tokens = self._fitting(rng)
            sizes[row] = len(tokens)
            ids[row, :len(tokens)] = tokens
            targets[row] = list_value(tokens)
        return as_batch(ids, targets, np.arange(self.length) == sizes[:, None] - 1, sizes)

    def _fitting(self, rng: np.random.Generator) -> list[int]:
        for _ in range(TRIES):
            if self.shortest <= len(tokens := self._list(rng, 1)) <= self.length:
                return tokens
        raise ValueError(f"ListOps: none of {TRIES:,} lists had {self.shortest} to {self.length} tokens; give shorter "
                         "ones, or a larger depth or arguments")

    def _list(self, rng: np.random.Generator, depth: int) -> list[int]:
        tokens = [10 + int(rng.integers(4))]
        nested = rng.random(int(rng.integers(2, self.arguments + 1))) < (0.25 if depth < self.depth else 0)
        for inner in nested:
            tokens += self._list(rng, depth + 1) if inner else [int(rng.integers(10))]
            if len(tokens) > self.length:
                break  # too long already: it will be thrown away
        return [*tokens, 14]


def list_value(tokens) -> int:
    """The value of a list in tokens."""
    stack = [[]]
    for token in tokens:
        if token == 14:
            operator, *values = stack.pop()
            stack[-1].append(int(OPERATORS[operator](values)))
        elif token >= 10:
            stack.append([token])
        else:
            stack[-1].append(int(token))
    return stack[0][0]


class Phonebook(Task):
    """Looking up a number in a phone book (Jelassi et al. 2024, "Repeat after me", arXiv:2402.01032, section 5), bytes.

        Bakimo: 5551234\\nTozula: 9182736\\n ... \\n Tozula: 9182736\\n      at the digits behind the blank line

    `entries` lines of a made-up name and seven digits, then `questions` of them again, after an empty line. All digits
    of the second part are scored; a row counts as exact when all are right. (The published book has real names, two
    questions as an example and one to be answered, for trained language models.) Trained with 1 to `entries` lines,
    tested with 1/2, 1 and 2 times as many. Chance: 1/10 a digit.

    Theory: the state must hold the book, 23 bits an entry, and the name: attention wins from some tens of entries on.
    """

    entries: int = 40
    questions: int = 3

    LINE = 16  # bytes: a name of 6, ": ", 7 digits and the end of the line

    def __post_init__(self):
        require(self.questions >= 1, self, "questions", "must be at least 1")
        require(self.entries >= self.questions, self, "entries", f"must be at least questions = {self.questions}")

    @property
    def vocab(self) -> int:
        return 256

    @property
    def context(self) -> int:
        return (self.entries + self.questions) * self.LINE

    @property
    def chance(self) -> float:
        return 1 / 10

    def tests(self) -> dict[str, Task]:
        sizes = dict.fromkeys(max(n, self.questions) for n in (self.entries, self.entries // 2, 2 * self.entries))
        return {f"{n} entries": dataclasses.replace(self, entries=n) for n in sizes}

    def make(self, draws: Draws, training: bool):
        letters = np.stack([np.frombuffer(b"bdfgklmnprstvz", np.uint8)[draws.below(14, self.entries, 3)],
                            np.frombuffer(b"aeiou", np.uint8)[draws.below(5, self.entries, 3)]], -1)
        lines = np.zeros((draws.rows, self.entries, self.LINE), int)
        lines[:, :, :6] = letters.reshape(draws.rows, self.entries, 6)
        lines[:, :, 0] -= 32  # a capital
        lines[:, :, 6:8] = list(b": ")
        lines[:, :, 8:15] = ord("0") + draws.below(10, self.entries, 7)
        lines[:, :, 15] = ord("\n")
        asked = draws.choose(self.entries, self.questions)
        answers = np.take_along_axis(lines, asked[:, :, None], 1)
        flat = lambda a: a.reshape(draws.rows, -1)
        tokens = np.concatenate([flat(lines), np.full((draws.rows, 1), ord("\n")), flat(answers)], 1)
        digit = (np.arange(self.questions * self.LINE) % self.LINE >= 8) & (
            np.arange(self.questions * self.LINE) % self.LINE < 15)
        scored = np.concatenate([np.zeros(self.entries * self.LINE + 1, bool), digit])
        return next_tokens(tokens, np.broadcast_to(scored, tokens.shape))


class Needle(Task):
    """A needle in a haystack, in bytes: a pass key somewhere in text that repeats itself (Mohtashami & Jaggi 2023,
    arXiv:2305.16300, section 4.2; the haystack of RULER's niah_single_1, Hsieh et al. 2024, arXiv:2404.06654).

        The grass is green. ... The pass key is 52931. ... What is the pass key? It is 52931      at the five digits

    length: T, in bytes. depth: where the needle lies, from 0 (at the beginning) to 1; None for anywhere. Trained
    anywhere at one length; tested on a grid of depths and lengths (`grid`). Chance: 1/10 a digit.

    Theory: five digits fit into any state, so a layer that chooses what to keep finds them at any depth and length;
    attention at the lengths that its positions reach; a fixed decay only near the end.
    """

    length: int = 512
    depth: float | None = None

    HAY = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    NEEDLE, QUESTION, DIGITS = b"The pass key is 00000. ", b"What is the pass key? It is 00000", 5

    def __post_init__(self):
        least = len(self.NEEDLE) + len(self.QUESTION)
        require(self.length >= least, self, "length", f"must be at least {least}, for needle and question")
        require(self.depth is None or 0 <= self.depth <= 1, self, "depth", "must be from 0 to 1, or None for anywhere")

    @property
    def vocab(self) -> int:
        return 256

    @property
    def context(self) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return 1 / 10

    def grid(self, depths=(0.0, 0.25, 0.5, 0.75, 1.0), factors=(1, 2, 4, 8)) -> dict[tuple[float, int], Task]:
        """{(depth, length): task}."""
        return {(depth, self.length * factor): dataclasses.replace(self, length=self.length * factor, depth=depth)
                for depth in depths for factor in factors}

    def tests(self) -> dict[str, Task]:
        return {str(self.length): self} | {f"{length} at {depth:.0%}": task
                                           for (depth, length), task in self.grid().items()}

    def make(self, draws: Draws, training: bool):
        hay = self.length + 1 - len(self.NEEDLE) - len(self.QUESTION)  # bytes of it in a row of T + 1
        text = np.frombuffer(self.HAY * (hay // len(self.HAY) + 1), np.uint8)[:hay].astype(int)
        ends = np.flatnonzero(text == ord(".")) + 2  # where a sentence begins: the needle does not break one
        begins = np.append(0, ends[ends <= hay])
        share = draws.uniform(1) if self.depth is None else np.full((draws.rows, 1), self.depth)
        place = begins[np.rint(share * (len(begins) - 1)).astype(int)]
        at = np.arange(hay + len(self.NEEDLE))
        inside = (at >= place) & (at < place + len(self.NEEDLE))
        needle = np.frombuffer(self.NEEDLE, np.uint8).astype(int)
        body = np.where(inside, needle[np.clip(at - place, 0, len(needle) - 1)],
                        text[np.clip(np.where(at < place, at, at - len(needle)), 0, hay - 1)])
        question = np.broadcast_to(np.frombuffer(self.QUESTION, np.uint8).astype(int), (draws.rows, len(self.QUESTION)))
        tokens = np.concatenate([body, question], 1)
        key = ord("0") + draws.below(10, self.DIGITS)
        np.put_along_axis(tokens, place + self.NEEDLE.index(b"0") + np.arange(self.DIGITS), key, 1)
        tokens[:, -self.DIGITS:] = key
        scored = np.arange(self.length + 1) > self.length - self.DIGITS
        return next_tokens(tokens, np.broadcast_to(scored, tokens.shape))
