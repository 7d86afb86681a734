"""Batches: documents laid end to end, cut into rows, shuffled, shared out to processes (a grain pipeline).

Row r holds tokens r * context to (r + 1) * context: rows overlap in one token, so that each token but the first is a
target once. A row's segments number its documents from 1, and 0 is padding, found only after the last token.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float32, Int32

from archlab.data.corpora import Corpus
from archlab.data.tokenizers import BpeTokenizer, ByteTokenizer

Tokenizer = ByteTokenizer | BpeTokenizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of text for one step, and what is to be predicted.

    `weights` is 1 where the target is the next token of the input's own document; elsewhere it is 0. `source` is what
    an encoder reads, where there is one.
    """

    ids: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]
    segments: Int32[np.ndarray, "B T"]
    weights: Float32[np.ndarray, "B T"]
    source: Int32[np.ndarray, "B S"] | None = None
    source_segments: Int32[np.ndarray, "B S"] | None = None


@dataclasses.dataclass(frozen=True)
class _Stream:
    """Documents end to end: tokens [S] in the narrowest type that holds them, and where each document ends."""

    tokens: np.ndarray
    ends: np.ndarray

    def rows(self, indices: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows `indices` [B] and their segments, each int32 [B, context + 1]; a row past the end is all padding."""
        positions = indices[:, None] * context + np.arange(context + 1)
        document = np.searchsorted(self.ends, positions, side="right")
        segments = document - document[:, :1] + 1
        rows = self.tokens.take(positions, mode="clip").astype(np.int32)
        if positions[:, -1].max() >= self.tokens.size:
            padding = positions >= self.tokens.size
            rows[padding] = segments[padding] = 0
        return rows, segments.astype(np.int32)

    def count(self, context: int) -> int:
        return -(-(self.tokens.size - 1) // context)

    def batch(self, indices: Sequence[int], context: int) -> Batch:
        rows, segments = self.rows(np.asarray(indices), context)
        real = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        return Batch(
            ids=np.ascontiguousarray(rows[:, :-1]),
            targets=np.ascontiguousarray(rows[:, 1:]),
            segments=np.ascontiguousarray(segments[:, :-1]),
            weights=real.astype(np.float32),
        )


def pack(documents: Sequence[np.ndarray], context: int) -> tuple[np.ndarray, np.ndarray]:
    """Lays documents (1-d arrays of ids) end to end and cuts rows of `context` + 1 tokens at a stride of `context`.

    Returns:
      rows and segments, int32 [N, context + 1]; the end of the last row is padding (token 0, segment 0).

    Raises:
      ValueError: a context below 1, or fewer than two tokens.
    """
    check_shape(context)
    stream = _stream(documents, np.int32, "documents")
    return stream.rows(np.arange(stream.count(context)), context)


def train_batches(
    corpus: Corpus,
    tokenizer: Tokenizer,
    context: int,
    batch: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Batches [batch / process_count, context] of the training side without end, shuffled anew in every epoch.

    corpus: or a task (archlab.data.tasks), whose rows have a length of their own, which `context` must be.

    Together the processes read at step k the rows that one process alone would. The iterator has `get_state()` (a
    dict of ints, at home in JSON) and `set_state(state)`, which resumes to the batch, on any number of processes.

    Raises:
      ValueError: the side is shorter than one row, `batch` does not divide by `process_count`, or a number is out of
        its range.
    """
    if not isinstance(corpus, Corpus):
        return corpus.train_batches(context, batch, seed, process_index, process_count)
    rows = check_shape(context, batch, process_index, process_count)
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    stream = _tokenised(corpus.train, tokenizer, f"training side of corpus {corpus.name!r}")
    if stream.tokens.size < context + 1:
        raise ValueError(
            f"corpus {corpus.name!r} has {stream.tokens.size} training tokens, fewer than one row of "
            f"context + 1 = {context + 1}; use a shorter context or more text"
        )
    import grain  # late: most of a second

    # grain shuffles epoch e by seed + e: hashed here, so that runs of seeds 0 and 1 do not share their orders.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(stream.count(context)).shuffle(seed).repeat()
    make = functools.partial(stream.batch, context=context)
    return iter(through_grain(order, make, rows, process_index, process_count))


def validation_batches(
    corpus: Corpus,
    tokenizer: Tokenizer,
    context: int,
    batch: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterable[Batch]:
    """Batches [batch / process_count, context] of the validation side, in order, the first `limit` or all of them.

    The last is filled up with padding (segment 0, weight 0), so all have one shape, all processes get equally many
    and every target counts once. What is returned can be iterated again. Raises ValueError as `train_batches` does,
    but a side shorter than one row is padded. Of a task, which has no end, None stands for 32 batches.
    """
    rows = check_shape(context, batch, process_index, process_count)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be 1 or more, or None for all batches")
    if not isinstance(corpus, Corpus):
        return corpus.validation_batches(context, batch, limit, process_index, process_count)
    stream = _tokenised(corpus.validation, tokenizer, f"validation side of corpus {corpus.name!r}")
    import grain

    batches = -(-stream.count(context) // batch)
    order = grain.MapDataset.range(min(batches, limit or batches) * batch)
    make = functools.partial(stream.batch, context=context)
    return through_grain(order, make, rows, process_index, process_count)


def through_grain(order, make: Callable[[Sequence[int]], Batch], rows: int, process_index: int, process_count: int):
    """Batches of an order of row numbers (a grain `MapDataset`), this process's share of them: only the numbers go
    through grain one by one, `make` gives the `rows` rows of a batch at once."""
    import grain

    order = order[process_index::process_count]
    batches = order.batch(rows, drop_remainder=True, batch_fn=make)
    # The tokens are in memory, or made there: threads would only contend for the interpreter's lock.
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


# One corpus is often read many times with one tokenizer, and BPE takes seconds; two is its train and its validation.
@functools.lru_cache(maxsize=2)
def _tokenised(documents: tuple[bytes, ...], tokenizer: Tokenizer, name: str) -> _Stream:
    dtype = np.uint8 if tokenizer.vocab <= 2**8 else np.uint16 if tokenizer.vocab <= 2**16 else np.int32
    return _stream([tokenizer.encode(document).astype(dtype) for document in documents], dtype, name)


def _stream(documents: Sequence[np.ndarray], dtype, name: str) -> _Stream:
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    if not ends.size or ends[-1] < 2:
        raise ValueError(f"{name}: {ends[-1] if ends.size else 0} tokens; the least is 2, an input and its target")
    ends = np.unique(ends[ends > 0])  # an empty document is none: it takes no segment number
    tokens = np.concatenate([np.asarray(document, dtype) for document in documents])
    return _Stream(tokens, ends)


def check_shape(context: int, batch: int = 1, process_index: int = 0, process_count: int = 1) -> int:
    """Checks the shape of batches and returns the rows of one process."""
    if context < 1:
        raise ValueError(f"context is {context}; it must be 1 or more")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index} of process_count {process_count}; use 0 to count - 1")
    if batch < 1 or batch % process_count:
        raise ValueError(f"batch is {batch}, which does not divide into process_count {process_count} equal parts")
    return batch // process_count
