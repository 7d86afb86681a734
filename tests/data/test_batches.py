"""Batches: every token once, documents kept apart, the same rows for any number of processes and after any resume."""

import json
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from archlab.data import BpeTokenizer, ByteTokenizer, Corpus, pack, train_batches, validation_batches

BYTES = ByteTokenizer()
rng = np.random.default_rng(0)
DOCUMENTS = tuple(rng.integers(0, 256, size).astype(np.uint8).tobytes() for size in (5, 1, 37, 8, 9, 2, 64, 3, 50))
CORPUS = Corpus("random", DOCUMENTS, DOCUMENTS[:5])


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def rows_of(batches):
    """Rows as a sorted list, to compare as multisets."""
    return sorted(leaf.tobytes() for batch in batches for leaf in np.concatenate(jax.tree.leaves(batch), axis=1))


@pytest.mark.parametrize("context", [1, 2, 7, 8, 200, 1000])
def test_packed_rows_rebuild_the_documents(context):
    documents = [BYTES.encode(document) for document in DOCUMENTS]
    rows, segments = pack(documents, context)
    chex.assert_shape([rows, segments], (-(-(sum(map(len, DOCUMENTS)) - 1) // context), context + 1))
    np.testing.assert_array_equal(rows[:-1, -1], rows[1:, 0])  # the one token two rows share
    flat = np.concatenate([rows[0], *rows[1:, 1:]])
    marks = np.concatenate([segments[0], *segments[1:, 1:]])
    assert flat[marks > 0].astype(np.uint8).tobytes() == b"".join(DOCUMENTS)
    assert not flat[marks == 0].any() and (marks[: sum(map(len, DOCUMENTS))] > 0).all()  # padding comes last
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    for row in range(len(rows)):
        here = owner[row * context : (row + 1) * context + 1]
        np.testing.assert_array_equal(segments[row, : len(here)], here - here[0] + 1)


def test_segments_and_weights_at_boundaries():
    corpus = Corpus("abc", (b"abc", b"de", b"f", b"ghij"), (b"abc", b"de", b"f", b"ghij"))
    (batch,) = validation_batches(corpus, BYTES, context=4, batch=4)
    as_text = [bytes(row.astype(np.uint8)) for row in np.concatenate([batch.ids, batch.targets])]
    assert as_text == [b"abcd", b"efgh", b"ij\0\0", b"\0" * 4] + [b"bcde", b"fghi", b"j\0\0\0", b"\0" * 4]
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2], [1, 2, 3, 3], [1, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.weights, [[1, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])


def test_an_empty_document_takes_no_segment():
    rows, segments = pack([np.array([]), np.array([1, 2]), np.array([]), np.array([3, 4, 5]), np.array([])], context=4)
    np.testing.assert_array_equal(rows, [[1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(segments, [[1, 1, 2, 2, 2]])


def test_a_batch_is_a_frozen_pytree_of_numpy_arrays():
    batch = next(train_batches(CORPUS, BYTES, context=8, batch=4, seed=0))
    chex.assert_shape(jax.tree.leaves(batch), (4, 8))
    assert [leaf.dtype for leaf in jax.tree.leaves(batch)] == [np.int32, np.int32, np.int32, np.float32]
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(batch))
    doubled = jax.jit(lambda batch: jax.tree.map(lambda leaf: 2 * leaf, batch))(batch)
    np.testing.assert_array_equal(doubled.targets, 2 * batch.targets)
    with pytest.raises(AttributeError):
        batch.ids = None


def test_every_epoch_holds_every_row_in_a_new_order():
    context = 8
    rows = len(pack([BYTES.encode(document) for document in DOCUMENTS], context)[0])
    epochs = [take(batches, rows) for batches in [train_batches(CORPUS, BYTES, context, 1, seed=3)] for _ in range(3)]
    assert rows_of(epochs[0]) == rows_of(epochs[1]) == rows_of(epochs[2])
    total = sum(batch.weights.sum() for batch in epochs[0])
    assert total == sum(len(document) - 1 for document in DOCUMENTS)
    orders = {np.concatenate([batch.ids for batch in epoch]).tobytes() for epoch in epochs}
    other_seed = take(train_batches(CORPUS, BYTES, context, 1, seed=4), rows)
    orders.add(np.concatenate([batch.ids for batch in other_seed]).tobytes())
    assert len(orders) == 4  # seed 3's second epoch is not seed 4's first either
    again = take(train_batches(CORPUS, BYTES, context, 1, seed=3), rows)
    chex.assert_trees_all_equal(epochs[0], again)


@pytest.mark.parametrize("stop", [0, 1, 6, 25])
def test_resuming_equals_going_on(stop):
    def fresh():
        return train_batches(CORPUS, BYTES, context=8, batch=4, seed=1)

    whole = take(fresh(), 30)  # an epoch is less than six batches
    first = fresh()
    chex.assert_trees_all_equal(take(first, stop), whole[:stop])
    state = json.loads(json.dumps(first.get_state()))
    take(first, 3)
    second = fresh()
    second.set_state(state)
    chex.assert_trees_all_equal(take(second, 30 - stop), whole[stop:])
    first.set_state(state)  # also back in time
    chex.assert_trees_all_equal(take(first, 2), whole[stop : stop + 2])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_rows_of_one(count):
    alone = take(train_batches(CORPUS, BYTES, 8, 4, seed=2), 12)
    shared = [train_batches(CORPUS, BYTES, 8, 4, 2, index, count) for index in range(count)]
    parts = [take(batches, 12) for batches in shared]
    for step in range(12):
        assert parts[0][step].ids.shape == (4 // count, 8)
        assert rows_of(part[step] for part in parts) == rows_of([alone[step]])
    one = train_batches(CORPUS, BYTES, 8, 4, seed=2)  # a state is a step: it fits any number of processes
    one.set_state(shared[-1].get_state())
    going_on = rows_of(next(batches) for batches in shared)
    assert going_on == rows_of([next(one)])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("context, batch", [(4, 6), (7, 6), (500, 6)])
def test_validation_counts_every_token_once(context, batch, count):
    shards = [list(validation_batches(CORPUS, BYTES, context, batch, None, index, count)) for index in range(count)]
    assert len({len(shard) for shard in shards}) == 1
    rows = pack([BYTES.encode(document) for document in CORPUS.validation], context)[0]
    seen = np.concatenate([b.targets[b.weights > 0] for shard in shards for b in shard])
    expected = np.concatenate([BYTES.encode(document)[1:] for document in CORPUS.validation])
    np.testing.assert_array_equal(np.sort(seen), np.sort(expected))
    if count == 1:
        np.testing.assert_array_equal(seen, expected)
        np.testing.assert_array_equal(np.concatenate([b.ids for b in shards[0]])[: len(rows)], rows[:, :-1])
    for shard in shards:
        chex.assert_shape([b.ids for b in shard], (batch // count, context))


def test_validation_is_limited_and_can_be_read_again():
    everything = validation_batches(CORPUS, BYTES, context=4, batch=2)
    assert len(list(everything)) == 8
    limited = validation_batches(CORPUS, BYTES, context=4, batch=2, limit=3)
    for _ in range(2):
        chex.assert_trees_all_equal(list(limited), list(everything)[:3])
    assert len(list(validation_batches(CORPUS, BYTES, context=4, batch=2, limit=100))) == 8


def test_bpe_batches_hold_the_text():
    text = "the cat sat on the mat; the dog sat on the log. " * 30
    corpus = Corpus("cats", (text.encode(), text[5:].encode()), (text[:200].encode(),))
    tokenizer = BpeTokenizer.train(corpus, 280)
    rows, segments = pack([tokenizer.encode(document) for document in corpus.train], 16)
    flat, marks = (np.concatenate([x[0], *x[1:, 1:]]) for x in (rows, segments))
    assert tokenizer.decode(flat[marks > 0]) == text + text[5:]
    batches = take(train_batches(corpus, tokenizer, 16, 1, seed=0), len(rows))
    assert sorted(b.ids.tobytes() for b in batches) == sorted(row[:-1].tobytes() for row in rows)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context": 0}, "context is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 3, "process_count": 2}, "batch is 3.*process_count 2"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2 of process_count 2"),
        ({"seed": -1}, "seed is -1"),
        ({"context": 179}, "'random' has 179 training tokens, fewer than one row of context \\+ 1 = 180"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_bad_numbers_are_named(change, message):
    common = {"corpus": CORPUS, "tokenizer": BYTES, "context": 8, "batch": 4} | change
    with pytest.raises(ValueError, match=message):
        if "limit" in change:
            validation_batches(**common)
        else:
            train_batches(**{"seed": 0} | common)


def test_too_little_to_pack_is_refused():
    for documents, count in [([], 0), ([np.array([7])], 1)]:
        with pytest.raises(ValueError, match=f"documents: {count} tokens"):
            pack(documents, 4)
    corpus = Corpus("little", (b"abc",), (b"d",))
    with pytest.raises(ValueError, match="validation side of corpus 'little': 1 tokens"):
        validation_batches(corpus, BYTES, 4, 1)
    assert next(train_batches(corpus, BYTES, 2, 1, seed=0)).ids.tolist() == [[97, 98]]  # a single row is enough


def test_import_is_light_and_reading_is_silent():
    code = """
import sys
import archlab.data as data
heavy = {"grain", "tensorflow_datasets", "tensorflow", "torch", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
corpus = data.Corpus("x", (b"some text " * 99,), (b"more text",))
next(data.train_batches(corpus, data.ByteTokenizer(), 8, 2, 0))
list(data.validation_batches(corpus, data.ByteTokenizer(), 8, 2))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
