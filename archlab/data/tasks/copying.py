"""Copying: what must be kept, and what may be forgotten."""

import dataclasses

import numpy as np

from archlab.data.tasks.task import Draws, Task, as_batch, at_lengths, positive
from archlab.layers.config import require


class SelectiveCopying(Task):
    """Selective copying (Gu & Dao 2023, arXiv:2312.00752, table 1; MAD's: Poli et al. 2024, arXiv:2403.17844).

        . a . . b . . . c . C . . .      at C and the places behind it: a b c

    `tokens` symbols 0 to symbols - 3 at random places among blanks (symbols - 2), the mark C (symbols - 1), then
    tokens - 1 blanks more. Published: length 4096, 16 tokens, 16 symbols, 2 layers, width 64, batch 64, rate 1e-4, 400k
    steps; MAD: length 256. (MAD puts no blank behind the last token; here all places are equally likely.)
    Chance: 1 / (symbols - 2).

    Theory: a layer that cannot choose by content (S4) cannot keep 16 tokens apart at places it does not know: published
    18%. Mamba, which skips blanks by a step of size 0, 99.8%. Attention solves it, too.
    """

    symbols: int = 16
    tokens: int = 16
    length: int = 4096

    def __post_init__(self):
        positive(self, "tokens")
        require(self.symbols >= 3, self, "symbols", "must be at least 3")
        require(self.length >= 2 * self.tokens, self, "length", f"must be at least 2 tokens = {2 * self.tokens}")

    @property
    def vocab(self) -> int:
        return self.symbols

    @property
    def context(self) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return 1 / (self.symbols - 2)

    def tests(self) -> dict[str, Task]:
        return at_lengths(self, "length", (self.length, 2 * self.length))

    def make(self, draws: Draws, training: bool):
        begin = self.length - self.tokens  # of the answer; C stands there
        data = draws.below(self.symbols - 2, self.tokens)
        ids = np.full((draws.rows, self.length), self.symbols - 2)
        np.put_along_axis(ids, np.sort(draws.choose(begin, self.tokens), axis=1), data, 1)
        ids[:, begin] = self.symbols - 1
        targets = np.zeros_like(ids)
        targets[:, begin:] = data
        return as_batch(ids, targets, np.broadcast_to(np.arange(self.length) >= begin, ids.shape))


class Copying(Task):
    """Copying a string (Jelassi et al. 2024, "Repeat after me", arXiv:2402.01032, section 4).

        a b c a C a b c      at C and at each copied token: the next token of the string

    Strings of `shortest` to `length` of 26 letters; rows end in padding. Tested on longer strings. Chance: 1 / letters.
    backwards: the last letter first (reversal, as of Dehghani et al. 2018, arXiv:1807.03819, table 4).

    Theory: a state of S bits holds S bits of a string, so recurrences copy what fits and no more, and learn it slowly;
    two layers of attention copy strings of any length by looking for what followed the last few letters, and reach
    lengths not trained on where their positions do (ALiBi and rotary somewhat, absolute ones not).
    """

    letters: int = 26
    shortest: int = 10
    length: int = 300
    backwards: bool = False

    def __post_init__(self):
        positive(self, "shortest")
        require(self.letters >= 2, self, "letters", "must be at least 2")
        require(self.length >= self.shortest, self, "length", f"must be at least shortest = {self.shortest}")

    @property
    def vocab(self) -> int:
        return self.letters + 1

    @property
    def context(self) -> int:
        return 2 * self.length

    @property
    def chance(self) -> float:
        return 1 / self.letters

    def tests(self) -> dict[str, Task]:
        return {str(n): dataclasses.replace(self, shortest=n, length=n) for n in
                (self.length, 2 * self.length, 4 * self.length)}

    def make(self, draws: Draws, training: bool):
        string = draws.below(self.letters, self.length)
        size = self.shortest + draws.below(self.length + 1 - self.shortest, 1)
        places = np.arange(2 * self.length)
        text = lambda at: np.take_along_axis(string, np.clip(at, 0, self.length - 1), 1)
        answer = lambda i: text(size - 1 - i if self.backwards else i)
        ids = np.where(places < size, text(places + 0 * size), answer(places - size - 1))
        ids = np.where(places == size, self.letters, ids)
        return as_batch(ids, answer(places - size), places >= size, 2 * size[:, 0])


class Compression(Task):
    """Compression of the MAD suite (Poli et al. 2024, arXiv:2403.17844): a whole row into one vector.

        x1 x2 ... xn C . . .      at the i-th place behind C: x_i

    length - 1 random symbols, the mark C = symbols - 1, and as many blanks. A model for this task has a bottleneck:
    what comes after C may see only what the layers made of C, as in the published auto-encoder (`experiments.mixers`
    puts one there). Published: 16 symbols, length 32. Chance: 1 / (symbols - 1).

    Theory: what counts is how much of the past one output can tell; published 0.39 (GLA) to 0.53 (Mamba, attention).
    """

    symbols: int = 16
    length: int = 32

    def __post_init__(self):
        require(self.symbols >= 3, self, "symbols", "must be at least 3")
        require(self.length >= 2, self, "length", "must be at least 2")

    @property
    def vocab(self) -> int:
        return self.symbols + 1

    @property
    def context(self) -> int:
        return 2 * self.length - 1

    @property
    def chance(self) -> float:
        return 1 / (self.symbols - 1)

    def make(self, draws: Draws, training: bool):
        data = draws.below(self.symbols - 1, self.length - 1)
        mark, blanks = np.full((draws.rows, 1), self.symbols - 1), np.full_like(data, self.symbols)
        ids = np.concatenate([data, mark, blanks], 1)
        targets = np.concatenate([0 * data, 0 * mark, data], 1)
        return as_batch(ids, targets, np.broadcast_to(np.arange(self.context) >= self.length, ids.shape))


class Memorisation(Task):
    """Memorisation of the MAD suite (Poli et al. 2024, arXiv:2403.17844): facts that are in no row.

        k1 ? k2 ? k3 ?      at each ?: the key's value

    A map of keys to values, the same in all rows (drawn once, from `map_seed`), must be learned by heart; the mixer has
    only to carry a key one place on. Published: 256 symbols, length 32 (of 256 rows; here rows never end, but there is
    no more to learn from them than the map). Chance: 1 / values.

    Theory: a matter of parameters more than of the mixer: MLPs learn it.
    """

    symbols: int = 256
    length: int = 32
    map_seed: int = 12345

    def __post_init__(self):
        require(self.symbols >= 5, self, "symbols", "must be at least 5")
        require(self.length >= 2 and self.length % 2 == 0, self, "length", "must be even, and at least 2")

    @property
    def vocab(self) -> int:
        return self.symbols

    @property
    def context(self) -> int:
        return self.length

    @property
    def values(self) -> np.ndarray:
        """The value of each key: a choice without repetition."""
        keys = (self.symbols - 1) // 2
        return keys + Draws(self.map_seed, "train", [0]).choose(self.symbols - 1 - keys, keys)[0]

    @property
    def chance(self) -> float:
        return 1 / len(self.values)

    def make(self, draws: Draws, training: bool):
        values = self.values
        keys = draws.below(len(values), self.length // 2)
        ask = np.full_like(keys, self.symbols - 1)
        ids = np.stack([keys, ask], -1).reshape(draws.rows, -1)
        targets = np.stack([0 * keys, values[keys]], -1).reshape(draws.rows, -1)
        return as_batch(ids, targets, np.broadcast_to(np.arange(self.length) % 2 == 1, ids.shape))
