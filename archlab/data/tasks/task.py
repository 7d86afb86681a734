"""What all tasks are: a config that makes rows of any number, on the fly, each from its own random numbers.

A task has no data. Row i of a seed holds the same tokens whoever asks for it, alone or in a batch, on any process: that
is what makes a run resumable to the batch and independent of how many processes share it.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from archlab.data.batches import Batch, check_shape, through_grain
from archlab.layers.config import Config, require

SPLITS = ("train", "validation", "test")  # each has row numbers and random numbers of its own
ROWS = 2**48  # rows of the training side: no run reaches the end


class Task(Config):
    """A generator of labelled rows. A subclass says what it needs in its fields, and defines `make`.

    Fields with the published settings are the defaults. Of a subclass:
      vocab: V, how many symbols there are, targets included. context: T of a row.
      chance: the accuracy of guessing the likeliest answer without looking at the row.
      tests(): {label: the same task with other settings}, on which a trained model is measured; keys are in order of
        difficulty and the first is what was trained on.
    """

    @property
    def vocab(self) -> int:
        raise TypeError(f"{type(self).__name__} does not say its vocab")

    @property
    def context(self) -> int:
        raise TypeError(f"{type(self).__name__} does not say its context")

    @property
    def chance(self) -> float:
        raise TypeError(f"{type(self).__name__} does not say its chance")

    def tests(self) -> dict[str, "Task"]:
        return {f"{self.context} tokens": self}

    def make(self, draws: "Draws", training: bool) -> Batch:
        """The rows of `draws`. training: with the targets of training, where those of a test are fewer."""
        raise TypeError(f"{type(self).__name__} does not say how a row is made")

    def train_batches(self, context: int, batch: int, seed: int, process_index: int, process_count: int):
        """As `archlab.data.train_batches` of a corpus."""
        self._check_context(context)
        return task_batches(self, batch, seed, process_index, process_count)

    def validation_batches(self, context: int, batch: int, limit: int | None, process_index: int, process_count: int):
        """As `archlab.data.validation_batches` of a corpus."""
        self._check_context(context)
        rows = batch * (limit or 32)
        return test_batches(self, batch, rows, "validation", 0, process_index, process_count)

    def _check_context(self, context: int) -> None:
        if context != self.context:
            raise ValueError(f"context is {context}; rows of this task have {self.context} tokens")


class Draws:
    """Random numbers for rows [B], those of a row depending on (seed, split, its number) alone.

    Each row has a SplitMix64 stream (Steele et al. 2014, "Fast splittable pseudorandom number generators"): the j-th
    number is a bijection of key + j * gamma, so all rows draw at once, without a generator object for each.
    """

    GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd

    def __init__(self, seed: int, split: str, numbers: Sequence[int]):
        numbers = np.asarray(numbers, np.uint64)
        key = _mix(_mix(np.uint64(seed)) + np.uint64(SPLITS.index(split)))
        self.rows = len(numbers)
        self._keys = _mix(key + self.GAMMA * numbers)
        self._drawn = 0

    def uniform(self, *shape: int) -> np.ndarray:
        """float64 [B, *shape] in [0, 1)."""
        size = int(np.prod(shape, dtype=np.int64))
        places = np.arange(self._drawn + 1, self._drawn + size + 1, dtype=np.uint64) * self.GAMMA
        self._drawn += size
        bits = _mix(self._keys[:, None] + places)
        return ((bits >> np.uint64(11)) * 2.0**-53).reshape(self.rows, *shape)

    def below(self, n, *shape: int) -> np.ndarray:
        """int64 [B, *shape] in [0, n); n may be an array that broadcasts against the result."""
        return (self.uniform(*shape) * n).astype(np.int64)

    def choose(self, n: int, k: int, weights: np.ndarray | None = None) -> np.ndarray:
        """int64 [B, k]: k of n without replacement, in the order drawn; each next one with a chance that is its share
        of the weights [n] that are left, by an exponential race (Efraimidis & Spirakis 2006)."""
        if k == 0:
            return np.zeros((self.rows, 0), np.int64)
        times = -np.log1p(-self.uniform(n))
        if weights is not None:
            times = times / weights
        first = np.argpartition(times, k - 1, axis=1)[:, :k] if k < n else np.broadcast_to(np.arange(n), times.shape)
        order = np.argsort(np.take_along_axis(times, first, 1), axis=1)
        return np.take_along_axis(first, order, 1)

    def generators(self) -> list[np.random.Generator]:
        """A NumPy generator for each row: for grammars, which grow their rows one symbol at a time."""
        return [np.random.Generator(np.random.Philox(key=int(key))) for key in self._keys]


def _mix(z):
    """SplitMix64's output function: a bijection of uint64 without visible structure."""
    with np.errstate(over="ignore"):
        z = np.atleast_1d(z)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def as_batch(ids: Int[np.ndarray, "B T"], targets: Int[np.ndarray, "B T"], scored: Bool[np.ndarray, "B T"],
             lengths: Int[np.ndarray, "B"] | None = None) -> Batch:
    """Rows of one document each. scored: where the target counts. lengths: of rows that end early, in padding."""
    real = np.ones(ids.shape, bool) if lengths is None else np.arange(ids.shape[1]) < lengths[:, None]
    scored = scored & real
    return Batch(ids=np.where(real, ids, 0).astype(np.int32), targets=np.where(scored, targets, 0).astype(np.int32),
                 segments=real.astype(np.int32), weights=scored.astype(np.float32))


def next_tokens(tokens: Int[np.ndarray, "B S"], scored: Bool[np.ndarray, "B S"]) -> Batch:
    """Rows [B, S - 1] whose targets are the next of `tokens`. scored: which tokens count as targets."""
    return as_batch(tokens[:, :-1], tokens[:, 1:], scored[:, 1:])


def task_batches(task: Task, batch: int, seed: int, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """Training batches [batch / process_count, T] without end, as `train_batches` gives them: together the processes
    read at step k the rows that one alone would, and `get_state()` and `set_state(state)` resume to the batch.

    Raises ValueError where `batch` does not divide by `process_count`, or a number is out of its range.
    """
    return iter(_batches(task, batch, ROWS, seed, "train", process_index, process_count))


def test_batches(task: Task, batch: int, rows: int, split: str = "test", seed: int = 0, process_index: int = 0,
                 process_count: int = 1) -> Iterable[Batch]:
    """The first `rows` rows (a multiple of `batch`) of a split, with the targets of a test; it can be read again."""
    if rows < 1 or rows % batch:
        raise ValueError(f"rows is {rows}; it must be a multiple of batch = {batch}")
    if split not in SPLITS[1:]:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS[1:])}")
    return _batches(task, batch, rows, seed, split, process_index, process_count)


def _batches(task: Task, batch: int, count: int, seed: int, split: str, process_index: int, process_count: int):
    import grain  # late: most of a second

    rows = check_shape(task.context, batch, process_index, process_count)
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    make = functools.partial(_make, task, seed, split)
    return through_grain(grain.MapDataset.range(count), make, rows, process_index, process_count)


def _make(task: Task, seed: int, split: str, numbers: Sequence[int]) -> Batch:
    return task.make(Draws(seed, split, numbers), training=split == "train")


def at_lengths(task: Task, field: str, lengths: Iterable[int], **more) -> dict[str, Task]:
    """The task with other values of `field`, under the labels "64", "128" ..."""
    return {str(length): dataclasses.replace(task, **{field: length}, **more) for length in lengths}


def positive(task: Task, *fields: str) -> None:
    """ValueError where a field is below 1."""
    for field in fields:
        require(getattr(task, field) >= 1, task, field, "must be at least 1")
