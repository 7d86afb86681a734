"""Generation: equal to the whole forward pass, whatever the padding and the growth of caches; compiled once."""

import functools
import logging
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import archlab
from archlab.attention.attention import Attention
from archlab.attention.cache import KVCache
from archlab.inference import generation
from archlab.inference.generation import generate, grow, stream
from archlab.layers.repeat import unstack
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.mamba import Mamba
from archlab.training.objectives import objective
from tests.helpers import build, cast, representatives, tokens_of

NANO = [n for n in representatives() if objective(archlab.get_config(n)) == "next token"]


@functools.cache
def model_of(name):
    return build(archlab.get_config(name))


@pytest.fixture
def small(monkeypatch):
    """Prompts from 4 tokens and caches from 8 slots on: 14 tokens then pass through two sizes."""
    monkeypatch.setattr(generation, "PROMPT", 4)
    monkeypatch.setattr(generation, "SLOTS", 8)


def prompt(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, length))


ROWS = [prompt(1, n, seed=n)[0] for n in (3, 6, 5)]


def ragged(side):
    """The rows as one padded batch: ids and segments [3, 6]."""
    pad = lambda a: np.pad(a, (0, 6 - len(a)) if side == "right" else (6 - len(a), 0))
    return np.stack([pad(row) for row in ROWS]), np.stack([pad(np.ones_like(row)) for row in ROWS])


def is_greedy(model, text, start, segments=None):
    """Whether every token from `start` on has the greatest logit of one pass over the whole text."""
    whole = jax.jit(lambda model, ids, segments: model(ids, segment_ids=segments).logits)
    logits = np.asarray(whole(model, jnp.asarray(text), segments))[:, start - 1:-1]
    chosen = np.take_along_axis(logits, np.asarray(text)[:, start:, None], -1)[..., 0]
    return (chosen >= logits.max(-1) - 1e-9).all()  # of two equal in all but round-off either will do


@pytest.mark.parametrize("name", NANO)
def test_greedy_is_the_argmax_of_the_whole_pass(name, float64, small):
    """Through padding and growing caches: rows of 3, 6 and 5 tokens, 8 slots and then 16."""
    model = cast(model_of(name), jnp.float64)  # round-off could flip a routing choice
    ids, left = ragged("left")
    text = generate(model, ids, 9, temperature=0, segment_ids=left)
    chex.assert_shape(text, (3, 15))
    np.testing.assert_array_equal(text[:, :6], ids)
    assert is_greedy(model, text[:, :-1], 6, jnp.pad(left, ((0, 0), (0, 8)), constant_values=1))
    ids, right = ragged("right")
    np.testing.assert_array_equal(generate(model, ids, 9, temperature=0, segment_ids=right)[:, 6:], text[:, 6:])


@pytest.mark.parametrize("name", ["transformer-nano", "mixture-of-recursions-nano"])
def test_neither_company_nor_the_sizes_of_caches_matter(name, float64, small, monkeypatch):
    model = unstack(cast(model_of(name), jnp.float64))
    ids, segments = ragged("left")
    together = np.asarray(generate(model, ids, 9, temperature=0, segment_ids=segments))[:, 6:]
    monkeypatch.setattr(generation, "SLOTS", 64)
    np.testing.assert_array_equal(generate(model, ROWS[0][None], 9, temperature=0)[0, -9:], together[0])


def test_what_is_new_belongs_to_the_last_document():
    model = unstack(model_of("transformer-nano"))
    ids = prompt(1, 7)
    packed = generate(model, ids, 5, temperature=0, segment_ids=np.array([[4, 4, 4, 7, 7, 7, 7]]))
    np.testing.assert_array_equal(packed[:, 7:], generate(model, ids[:, 3:], 5, temperature=0)[:, 4:])


def test_a_ring_grows_to_its_window(float64, small):
    body = Sequence(Attention(2, window=11), Mamba(state=4))
    model = cast(build(LanguageModel(256, 16, body)), jnp.float64)  # the ring has 8 slots, then 11, and comes round
    assert is_greedy(model, generate(model, prompt(2, 3), 27, temperature=0), 3)


def test_growth_keeps_slots_until_a_ring_comes_round():
    def filled(slots, count):
        cache = KVCache.empty(1, 1, slots, 1, jnp.float32)
        for i in range(count):
            cache = cache.append(jnp.full((1, 1, 1, 1), i + 1.0), jnp.full((1, 1, 1, 1), i + 1.0), tokens_of([[1]]))
        return cache

    larger = KVCache.empty(1, 1, 8, 1, jnp.float32)
    for count in (0, 3, 4):
        chex.assert_trees_all_equal(grow(filled(4, count), larger), filled(8, count))
    with pytest.raises(AssertionError):  # one token too late: its slot is another
        chex.assert_trees_all_equal(grow(filled(4, 5), larger), filled(8, 5))
    same = filled(8, 12)
    assert grow(same, larger).keys is same.keys  # a ring at its window stays as it is


def test_stream_gives_what_generate_gives(small):
    model = unstack(model_of("mamba-nano"))
    settings = dict(max_new_tokens=20, temperature=1.0, top_k=20, top_p=0.9)
    whole = generate(model, prompt(2, 5), rngs=nnx.Rngs(3), **settings)
    steps = list(stream(model, prompt(2, 5), rngs=nnx.Rngs(3), **settings))
    np.testing.assert_array_equal(np.stack(steps, 1), whole[:, 5:])


def test_seeds():
    model = unstack(model_of("mamba-nano"))
    run = lambda seed: np.asarray(generate(model, prompt(1, 4), 20, temperature=1.0, rngs=nnx.Rngs(seed)))
    np.testing.assert_array_equal(run(1), run(1))
    assert (run(1) != run(2)).any()
    rngs = nnx.Rngs(1)  # one source, two texts
    assert (generate(model, prompt(1, 4), 20, rngs=rngs) != generate(model, prompt(1, 4), 20, rngs=rngs)).any()


def test_top_k_of_one_is_greedy():
    model = unstack(model_of("transformer-nano"))
    np.testing.assert_array_equal(generate(model, prompt(2, 4), 10, temperature=2.0, top_k=1),
                                  generate(model, prompt(2, 4), 10, temperature=0))


def test_rows_end_at_any_eos():
    model = unstack(model_of("transformer-nano"))
    free = np.asarray(generate(model, prompt(2, 4), 12, temperature=0))[:, 4:]
    for eos in (int(free[0, 3]), [int(free[1, 5]), int(free[0, 3])]):
        text = np.asarray(generate(model, prompt(2, 4), 12, temperature=0, eos=eos))[:, 4:]
        for row, ended in zip(free, text):
            end = min([list(row).index(e) for e in np.atleast_1d(eos) if e in row], default=len(row) - 1)
            np.testing.assert_array_equal(ended, [*row[:end], *[row[end]] * (len(row) - end)])
        ends = np.isin(text, eos).any(1).all()  # then nothing more comes
        assert len(list(stream(model, prompt(2, 4), 12, temperature=0, eos=eos))) == (
            np.isin(text, eos).argmax(1).max() + 1 if ends else 12)
    assert (text == text[:, -1:])[:, -6:].all()


def slow_penalty(whole, row, new, penalty):
    """Greedy text of one row under a repetition penalty, by whole passes. whole: logits [1, 32, V] of ids [1, 32]."""
    row = list(row)
    for _ in range(new):
        padded = np.zeros((1, 32), np.int32)  # nothing looks ahead
        padded[0, :len(row)] = row
        logits = np.array(whole(padded)[0, len(row) - 1])
        for v in set(row):
            logits[v] = logits[v] * penalty if logits[v] < 0 else logits[v] / penalty
        row.append(int(logits.argmax()))
    return row[-new:]


@pytest.mark.parametrize("side", ["left", "right"])
def test_repetition_penalty_counts_prompt_and_text_without_padding(side):
    model = unstack(model_of("transformer-nano"))
    ids, segments = ragged(side)
    likely = generate(model, ROWS[0][None], 1, temperature=0)[0, -1]
    ids = np.where(segments > 0, ids, likely)
    text = np.asarray(generate(model, ids, 12, temperature=0, segment_ids=segments, repetition_penalty=1.8))[:, 6:]
    whole = jax.jit(lambda ids: model(ids).logits)
    for row, new in zip(ROWS, text):
        np.testing.assert_array_equal(new, slow_penalty(whole, row, 12, 1.8))
    plain = np.asarray(generate(model, ids, 12, temperature=0, segment_ids=segments))[:, 6:]
    assert (plain != text).any()
    np.testing.assert_array_equal(
        generate(model, ids, 12, temperature=0, segment_ids=segments, repetition_penalty=1.0)[:, 6:], plain)
    np.testing.assert_array_equal(
        np.stack(list(stream(model, ids, 12, temperature=0, segment_ids=segments, repetition_penalty=1.8)), 1), text)


def test_repetition_penalty_counts_the_last_document():
    model, ids = unstack(model_of("transformer-nano")), prompt(1, 9)
    packed = generate(model, ids, 8, temperature=0, repetition_penalty=3.0, segment_ids=[[2, 2, 7, 7, 7, 4, 4, 4, 4]])
    np.testing.assert_array_equal(packed[:, 9:],
                                  generate(model, ids[:, 5:], 8, temperature=0, repetition_penalty=3.0)[:, 4:])


def test_repetition_penalty_of_an_encoder_decoder_counts_what_is_written():
    model, source = unstack(model_of("t5-nano")), prompt(1, 7)
    text = generate(model, source, 8, temperature=0, repetition_penalty=1.5)
    whole = jax.jit(lambda ids: model(ids, memory=model.encode(jnp.asarray(source))[0]).logits)
    np.testing.assert_array_equal(text[0], slow_penalty(whole, [model.config.start], 8, 1.5))


def test_first_and_last_tokens_can_be_forced():
    model = unstack(model_of("transformer-nano"))
    text = np.asarray(generate(model, prompt(2, 4), 6, temperature=0, first=9, last=5))[:, 4:]
    assert (text[:, 0] == 9).all() and (text[:, -1] == 5).all()
    begun = np.append(prompt(2, 4), [[9], [9]], 1)
    np.testing.assert_array_equal(text[:, 1:-1], generate(model, begun, 4, temperature=0)[:, 5:])
    steps = list(stream(model, prompt(2, 4), 6, temperature=0, first=9, last=5))
    np.testing.assert_array_equal(np.stack(steps, 1), text)
    assert generate(model, prompt(1, 4), 1, first=9, last=5)[0, -1] == 5
    ended = np.asarray(generate(model, prompt(1, 4), 6, temperature=0, first=9, last=5, eos=9))[0, 4:]
    assert (ended == 9).all()  # a row that has ended stays so


def test_nothing_compiles_after_warm_up(caplog):
    model = unstack(model_of("transformer-nano"))
    settings = lambda i: dict(temperature=0.5 + i / 10, top_p=0.9 - i / 10, min_p=0.1 + i / 100,
                              repetition_penalty=1 + i / 10, eos=[i, 7], rngs=nnx.Rngs(i))

    def compiled(run):
        """The model's programs that `run` compiles (the concatenation of a text of another length is none)."""
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            run()
        said = "\n".join(record.getMessage() for record in caplog.records)
        return set(re.findall(r"Finished XLA compilation of jit\((prefill|step|steps|larger)\)", said))

    generation._programs.cache_clear()
    assert compiled(lambda: generate(model, prompt(1, 9), 100, **settings(0))) == {"prefill", "steps"}
    assert compiled(lambda: list(stream(model, prompt(1, 9), 10, **settings(0)))) == {"step"}
    for i, (length, new) in enumerate([(9, 100), (12, 100), (16, 64), (10, 33)]):
        assert not compiled(lambda: generate(model, prompt(1, length), new, **settings(i)))
    assert not compiled(lambda: list(stream(model, prompt(1, 14), 100, **settings(1))))
    assert compiled(lambda: generate(model, prompt(1, 17), 2, **settings(0))) == {"prefill"}


@pytest.mark.parametrize("wrong, message", [
    (dict(prompt_ids=np.zeros((1, 0), int)), r"prompt_ids of shape \(1, 0\)"),
    (dict(prompt_ids=np.zeros((3,), int)), r"prompt_ids of shape \(3,\)"),
    (dict(prompt_ids=np.zeros((1, 3))), "float64"),
    (dict(prompt_ids=np.array([[3, 256]])), "256"), (dict(prompt_ids=np.array([[-1, 3]])), "-1"),
    (dict(segment_ids=np.zeros((2, 2), int)), r"segment_ids of shape \(2, 2\)"),
    (dict(prompt_ids=np.ones((2, 2), int), segment_ids=np.array([[1, 1], [0, 0]])), "row 1"),
    (dict(max_new_tokens=0), "max_new_tokens = 0"), (dict(temperature=-1.0), "temperature = -1.0"),
    (dict(top_k=257), "top_k = 257"), (dict(top_p=1.5), "top_p = 1.5"), (dict(eos=256), "eos = 256"),
    (dict(eos=[3, -1]), r"eos = \[3, -1\]"), (dict(eos=1.5), "eos = 1.5"), (dict(first=256), "first = 256"),
    (dict(last=-2), "last = -2"), (dict(min_p=2.0), "min_p = 2.0"),
    (dict(repetition_penalty=0.0), "repetition_penalty = 0.0"),
])
def test_bad_input_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(model_of("mamba-nano"), **{"prompt_ids": np.array([[1, 2]]), **wrong})
