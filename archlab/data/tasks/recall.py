"""Associative recall: what followed this before? The tasks at which attention is good, and states must be large enough.

A layer with a state of S numbers can hold about S of them: as the pairs to be remembered grow, recurrences fail one
after another in the order of their states, and attention, whose state grows with the text, does not (Arora et al. 2024,
arXiv:2402.18668). A fixed convolution cannot compare tokens at all but through its gates, and needs a width that grows
with the length (Arora et al. 2023, arXiv:2312.04927).
"""

import dataclasses
import itertools

import numpy as np

from archlab.data.tasks.task import Draws, Task, as_batch, at_lengths, next_tokens, positive
from archlab.layers.config import require


class MQAR(Task):
    """Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv:2312.04927, section 4 and figure 2).

        k1 v1 k2 v2 ... kn vn  .  k2  .   .  k1  .      at each later key: its value

    Keys 1 to vocab/2 - 1 and values vocab/2 to vocab - 1, each without repetition; each key is asked for once, g pairs
    of places after the last pair with a chance that falls as g^(power - 1); between are zeros, or random tokens where
    `noise`. Figure 2 has (length, pairs) = (64, 4), (128, 8), (256, 16), (512, 64), 2 layers without MLP, widths 64 to
    512. Chance: 1 / (vocab / 2); a model that knows which values are in the row guesses one of n.

    Theory: attention solves all of it at any width. Recurrences solve it while their state holds the pairs; the delta
    rule, which overwrites, with the least. Convolutions whose filters are fixed need a width near the length.
    """

    symbols: int = 8192
    length: int = 64
    pairs: int = 4
    power: float = 0.01
    noise: bool = False

    def __post_init__(self):
        positive(self, "pairs", "length")
        require(self.power > 0, self, "power", "must be positive")
        require(self.symbols >= 2 * self.pairs + 2, self, "symbols", f"must be at least {2 * self.pairs + 2}, for "
                f"{self.pairs} keys and as many values")
        require(self.length >= 4 * self.pairs, self, "length", f"must be at least 4 pairs = {4 * self.pairs}")

    @property
    def vocab(self) -> int:
        return self.symbols

    @property
    def context(self) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return 1 / (self.symbols - self.symbols // 2)

    def tests(self) -> dict[str, Task]:
        twice = dataclasses.replace(self, length=2 * self.length, pairs=2 * self.pairs) \
            if self.symbols >= 4 * self.pairs + 2 else None
        label = lambda task: f"{task.length} tokens, {task.pairs} pairs"
        return {label(task): task for task in (self, twice) if task}

    def make(self, draws: Draws, training: bool):
        half, n = self.symbols // 2, self.pairs
        keys, values = 1 + draws.choose(half - 1, n), half + draws.choose(self.symbols - half, n)
        ids = draws.below(self.symbols, self.length) if self.noise else np.zeros((draws.rows, self.length), int)
        ids[:, 0:2 * n:2], ids[:, 1:2 * n:2] = keys, values
        space = (self.length - 2 * n) // 2
        places = 2 * n + 2 * draws.choose(space, n, np.arange(1, space + 1) ** (self.power - 1))
        targets, scored = np.zeros_like(ids), np.zeros(ids.shape, bool)
        np.put_along_axis(ids, places, keys, 1)
        np.put_along_axis(targets, places, values, 1)
        np.put_along_axis(scored, places, True, 1)
        return as_batch(ids, targets, scored)


class InductionHeads(Task):
    """Induction heads (Fu et al. 2022, H3, arXiv:2212.14052; here as in Gu & Dao 2023, arXiv:2312.00752, table 2).

        x x x M a x x ... x M      at the last token: a

    Random tokens 0 to symbols - 2, and the mark M = symbols - 1 twice: once anywhere, once at the end. Trained at one
    length (256) and tested from 2^6 to 2^14 and beyond. Two layers, width 64. Chance: 1 / (symbols - 1).
    marks: M stands 2 to `marks` times in a row of training, each time before a, which is asked for at each but the
    first; more than the published 2 give more to learn from in a short training. A test has 2.

    Theory: Mamba learns to store what follows M and nothing else, which works at any length (100% to 2^20 as
    published). Attention needs two layers, solves its own length, and goes to chance beyond two times of it: with
    absolute positions at once, with relative ones more slowly. Layers that cannot choose by content (S4) fail.
    """

    symbols: int = 16
    length: int = 256
    lengths: tuple[int, ...] = (64, 256, 512, 1024, 2048, 4096, 8192, 16384)
    marks: int = 2

    def __post_init__(self):
        most = self.length // 2
        require(2 <= self.marks <= most, self, "marks", f"must be from 2 to length / 2 = {most}")
        require(self.symbols >= 3, self, "symbols", "must be at least 3")
        require(min(self.lengths, default=4) >= 4, self, "lengths", "must be at least 4 each")

    @property
    def vocab(self) -> int:
        return self.symbols

    @property
    def context(self) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return 1 / (self.symbols - 1)

    def tests(self) -> dict[str, Task]:
        return at_lengths(self, "length", dict.fromkeys((self.length, *self.lengths)), marks=2)

    def make(self, draws: Draws, training: bool):
        mark, ids = self.symbols - 1, draws.below(self.symbols - 1, self.length)
        answer = draws.below(mark, 1)
        # Places for pairs: every second, beginning at the first or the second token; the last token is the question.
        pairs = (self.length - 2) // 2
        places = 2 * draws.choose(pairs, self.marks - 1) + draws.below(self.length - 1 - 2 * pairs, 1)
        count = 1 + draws.below(self.marks - 1, 1)
        places = np.sort(np.where(np.arange(self.marks - 1) < count, places, places[:, :1]), axis=1)
        np.put_along_axis(ids, places, mark, 1)
        np.put_along_axis(ids, places + 1, np.broadcast_to(answer, places.shape), 1)
        ids[:, -1] = mark
        scored = ids == mark
        np.put_along_axis(scored, places[:, :1], False, 1)
        return as_batch(ids, np.where(scored, answer, 0), scored)


class InContextRecall(Task):
    """In-context and noisy recall of the MAD suite (Poli et al. 2024, arXiv:2403.17844, section 3.1).

        k1 v1 k3 v3 n n k1 v1 ... k3 v3      at a key that came before: its value

    Pairs of a key and a value, which every row assigns anew (values may be shared); with the chance `noise_share` a
    pair is two noise tokens instead; the last pair repeats a key that has been seen. Published: 16 symbols without
    noise, or 32 of which 16 are noise and noise_share 0.2; length 128. Training's targets are all next tokens, as
    published; a test scores the values of repeated keys. Chance: 1 / values.

    Theory: attention near 1 (published 0.94; noisy 0.87); the delta rule 1.0 in both; Mamba 0.90; Hyena 0.82.
    """

    symbols: int = 16
    noise_symbols: int = 0
    noise_share: float = 0.0
    length: int = 128

    def __post_init__(self):
        require(self.symbols - self.noise_symbols >= 4, self, "symbols", "must leave 4 or more for keys and values")
        require(0 <= self.noise_share < 1, self, "noise_share", "must be a share, below 1")
        require(self.noise_share == 0 or self.noise_symbols > 0, self, "noise_symbols", "must be above 0 for noise")
        require(self.length >= 4 and self.length % 2 == 0, self, "length", "must be even, and at least 4")

    @property
    def vocab(self) -> int:
        return self.symbols

    @property
    def context(self) -> int:
        return self.length - 1

    @property
    def keys(self) -> int:
        return (self.symbols - self.noise_symbols) // 2

    @property
    def chance(self) -> float:
        return 1 / (self.symbols - self.noise_symbols - self.keys)

    def tests(self) -> dict[str, Task]:
        return at_lengths(self, "length", (self.length, 2 * self.length))

    def make(self, draws: Draws, training: bool):
        pairs, loud = self.length // 2, self.symbols - self.noise_symbols
        keys = draws.below(self.keys, pairs)
        value_of = self.keys + draws.below(loud - self.keys, self.keys)
        noise = draws.uniform(pairs) < self.noise_share
        np.put_along_axis(noise, draws.below(pairs - 1, 1), False, 1)  # at least one pair to ask for
        noise[:, -1] = False
        shown = np.zeros((draws.rows, self.keys), bool)
        rows = np.arange(draws.rows)
        repeated = np.zeros(keys.shape, bool)
        for i in range(pairs - 1):
            repeated[:, i] = shown[rows, keys[:, i]] & ~noise[:, i]
            shown[rows, keys[:, i]] |= ~noise[:, i]
        keys[:, -1] = np.where(shown, draws.uniform(self.keys), -1).argmax(1)
        repeated[:, -1] = True
        tokens = np.stack([keys, np.take_along_axis(value_of, keys, 1)], -1)
        if self.noise_symbols:
            tokens = np.where(noise[..., None], loud + draws.below(self.noise_symbols, pairs, 2), tokens)
        scored = np.stack([np.zeros_like(repeated), repeated], -1).reshape(draws.rows, -1)
        return next_tokens(tokens.reshape(draws.rows, -1), np.ones_like(scored) if training else scored)


class FuzzyRecall(Task):
    """Fuzzy in-context recall of the MAD suite (Poli et al. 2024, arXiv:2403.17844): keys and values of several tokens.

        k k k v | k v v | k k v v | ... | k k k v      at repeated keys: the tokens of the value

    A key is 1 to `motif` different tokens of the key half, a value as many of the value half; every row assigns values
    anew. In a test keys have `motif` tokens, as published. The last pair repeats one that has been seen; the row is
    filled from the left with a padding symbol, the last of the vocabulary. Training's targets are all next tokens.
    Published: 16 symbols, length 128, motif 3. Chance: 1 / value tokens.

    Theory: hard for all (published: attention 0.30, delta rule 0.36, Mamba 0.07): a key must first be put together.
    """

    symbols: int = 16
    motif: int = 3
    length: int = 128

    def __post_init__(self):
        positive(self, "motif")
        require((self.symbols - 1) // 2 >= self.motif, self, "symbols", f"must be at least {2 * self.motif + 1}")
        require(self.length >= 8 * self.motif, self, "length", f"must be at least 8 motifs = {8 * self.motif}")

    @property
    def vocab(self) -> int:
        return self.symbols

    @property
    def context(self) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return 1 / (self.symbols - 1 - (self.symbols - 1) // 2)

    def make(self, draws: Draws, training: bool):
        half, motif, rows = (self.symbols - 1) // 2, self.motif, np.arange(draws.rows)
        keys, values = _motifs(range(half), motif), _motifs(range(half, self.symbols - 1), motif)
        value_of = _pick(values, draws, 1, len(keys.tokens))  # [B, all keys]
        chosen = _pick(keys, draws, 1 if training else motif, self.length // 2)  # more pairs than a row can hold
        mine = np.take_along_axis(value_of, chosen, 1)
        sizes = keys.sizes[chosen] + values.sizes[mine]
        starts = np.cumsum(sizes, 1) - sizes
        kept = starts < self.length - 4 * motif
        last = (draws.uniform() * kept.sum(1)).astype(int)  # the pair that is asked for again, at the end
        count = kept.sum(1)
        chosen[rows, count], mine[rows, count] = chosen[rows, last], mine[rows, last]
        kept[rows, count] = True

        seen = np.zeros((draws.rows, len(keys.tokens)), bool)
        repeated = np.zeros(kept.shape, bool)
        for i in range(kept.shape[1]):
            repeated[:, i] = seen[rows, chosen[:, i]]
            seen[rows, chosen[:, i]] |= kept[:, i]
        tokens = np.concatenate([keys.tokens[chosen], values.tokens[mine]], -1)  # [B, pairs, 2 motif], -1 for nothing
        scored = repeated[..., None] & (np.arange(2 * motif) >= motif)
        tokens, scored = tokens.reshape(draws.rows, -1), np.broadcast_to(scored, tokens.shape).reshape(draws.rows, -1)
        real = np.repeat(kept, 2 * motif, 1) & (tokens >= 0)
        order = np.argsort(real, axis=1, kind="stable")[:, -(self.length + 1):]  # what is real comes last, in its order
        real, tokens, scored = (np.take_along_axis(a, order, 1) for a in (real, tokens, scored))
        tokens = np.where(real, tokens, self.symbols - 1)
        return next_tokens(tokens, np.ones_like(real) if training else scored & real)


@dataclasses.dataclass(frozen=True)
class _Motifs:
    """All ordered choices of 1 to `motif` different symbols: tokens [M, motif], -1 where there is none, before the
    tokens of a key and behind those of a value; sizes [M], rising; begins [motif + 2]: where each size begins."""

    tokens: np.ndarray
    sizes: np.ndarray
    begins: np.ndarray


def _motifs(symbols: range, motif: int) -> _Motifs:
    found = [choice for size in range(1, motif + 1) for choice in itertools.permutations(symbols, size)]
    sizes = np.array([len(choice) for choice in found])
    tokens = np.array([choice + (-1,) * (motif - len(choice)) for choice in found])
    return _Motifs(tokens, sizes, np.searchsorted(sizes, np.arange(motif + 2)))


def _pick(motifs: _Motifs, draws: Draws, smallest: int, count: int) -> np.ndarray:
    """Numbers of motifs [B, count]: first a size, then one of that size."""
    size = smallest + draws.below(motifs.sizes[-1] + 1 - smallest, count)
    return motifs.begins[size] + draws.below(motifs.begins[size + 1] - motifs.begins[size], count)
