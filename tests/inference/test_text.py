"""Text in, text out: prompts of different lengths, streams, ends and settings."""

import numpy as np
import pytest
from flax import nnx

import archlab
from archlab.data import ByteTokenizer
from archlab.inference.generation import generate
from archlab.inference.text import TextModel
from tests.helpers import build

PROMPTS = ["def f(x):", "a", "naïve"]


@pytest.fixture(scope="module")
def model():
    return build(archlab.get_config("transformer-nano"))


def words(ids) -> str:
    return ByteTokenizer().decode(ids)


def test_several_prompts_are_each_as_if_alone(model):
    text = TextModel(model, ByteTokenizer(), temperature=0, max_new_tokens=9)
    together = text.generate(PROMPTS)
    assert together == [text.generate(prompt)[0] for prompt in PROMPTS]
    ids = ByteTokenizer().encode(PROMPTS[0])
    assert together[0] == words(np.asarray(generate(model, ids[None], 9, temperature=0))[0, len(ids):])
    assert "".join(text.stream(PROMPTS[2])) == together[2]


def test_settings_of_a_call_go_before_those_of_the_model(model):
    text = TextModel(model, ByteTokenizer(), temperature=1.0, max_new_tokens=12)
    seeded = lambda seed, **more: text.generate("abc", rngs=nnx.Rngs(seed), **more)[0]
    assert seeded(1) == seeded(1) != seeded(2)
    assert seeded(1, temperature=0) == seeded(2, temperature=0)
    greedy = np.asarray(generate(model, ByteTokenizer().encode("abc")[None], 5, temperature=0, repetition_penalty=1.3))
    assert seeded(1, temperature=0, repetition_penalty=1.3, max_new_tokens=5) == words(greedy[0, 3:])


def test_texts_end_before_an_eos(model):
    text = TextModel(model, ByteTokenizer(), temperature=0)
    ids = np.asarray(generate(model, ByteTokenizer().encode("abc")[None], 64, temperature=0))[0, 3:]
    end = next(i for i in range(4, 64) if ids[i] not in ids[:i])
    for eos in (int(ids[end]), [int(ids[end]), int(ids[-1])]):
        stop = min(list(ids).index(e) for e in np.atleast_1d(eos))
        assert text.generate("abc", eos=eos) == [words(ids[:stop])] == ["".join(text.stream("abc", eos=eos))]


def test_max_length_counts_the_prompt(model):
    text = TextModel(model, ByteTokenizer(), max_length=12, temperature=0)
    assert text.generate("abcd") == text.generate("abcd", max_new_tokens=8)
    with pytest.raises(ValueError, match="max_length = 12 is no more than the 12 tokens"):
        text.generate("twelve bytes")


def test_ids_that_only_the_model_has_are_no_text():
    model = build(archlab.get_config("transformer-nano", vocab=300))
    text = TextModel(model, ByteTokenizer(), temperature=0, max_new_tokens=4, first=299)
    ids = np.asarray(generate(model, ByteTokenizer().encode("abc")[None], 4, temperature=0, first=299))[0, 3:]
    assert text.generate("abc") == [words(ids[ids < 256])] == ["".join(text.stream("abc"))]


def test_an_encoder_decoder_writes_a_text_of_its_own():
    model = build(archlab.get_config("t5-nano"))
    text = TextModel(model, ByteTokenizer(), temperature=0, max_new_tokens=6)
    together = text.generate(PROMPTS)
    source = ByteTokenizer().encode(PROMPTS[0])[None]
    assert together[0] == words(np.asarray(generate(model, source, 6, temperature=0))[0])
    assert "".join(text.stream(PROMPTS[1])) == together[1]


def test_a_prompt_has_a_token(model):
    text = TextModel(model, ByteTokenizer())
    for prompts in ("", [], ["a", ""]):
        with pytest.raises(ValueError, match="must be at least one, with at least one token"):
            text.generate(prompts)
