"""Tokenizers: nothing is lost, bytes are counted, streams never break a character."""

import json

import numpy as np
import pytest

from archlab.data import BpeTokenizer, ByteTokenizer, Corpus, tokenizer_from

WORDS = "the quick brown fox, naïve café, 日本語 🙂; def f(x):\n\treturn x ** 2\n"
CORPUS = Corpus("words", tuple(WORDS.encode() * n for n in range(1, 6)), (b"the fox",))


@pytest.fixture(scope="module", params=["bytes", "bpe:300"])
def tokenizer(request):
    return tokenizer_from(request.param, CORPUS)


@pytest.mark.parametrize("text", ["", " leading", "two  spaces \r\n", WORDS, "unseen: Ωß\x00\u0100Ġ"])
def test_round_trip_and_bytes_per_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    np.testing.assert_array_equal(ids, tokenizer.encode(text.encode()))
    assert tokenizer.decode(ids) == text and tokenizer.to_bytes(ids) == text.encode()
    assert tokenizer.bytes_per_token.shape == (tokenizer.vocab,)
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())


def test_bytes_are_the_identity():
    tokenizer, every = ByteTokenizer(), bytes(range(256))
    assert tokenizer.vocab == 256
    np.testing.assert_array_equal(tokenizer.encode(every), np.arange(256))
    assert tokenizer.to_bytes(tokenizer.encode(every)) == every
    assert tokenizer.decode([104, 105, 0xFF]) == "hi\ufffd"


def test_stream_yields_whole_characters_as_soon_as_they_are_there(tokenizer):
    ids = tokenizer.encode(WORDS)
    pieces = list(tokenizer.stream(iter(ids)))
    assert "".join(pieces) == WORDS and "\ufffd" not in "".join(pieces) and all(pieces)
    assert list(ByteTokenizer().stream("aé🙂".encode())) == ["a", "é", "🙂"]
    broken = b"a\xf0\x9f b\xe2\x82"  # a stream that ends in mid-character, and one that breaks off
    assert "".join(ByteTokenizer().stream(broken)) == broken.decode(errors="replace")


def test_bpe_learns_the_same_merges_again_and_shortens(tmp_path):
    first, second = (BpeTokenizer.train(CORPUS, 300) for _ in range(2))
    assert first.vocab == 300
    first.save(tmp_path / "tokenizer.json")
    second.save(tmp_path / "second.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "second.json").read_bytes()
    assert len(first.encode(WORDS)) < len(WORDS.encode()) / 2
    loaded = tokenizer_from(str(tmp_path / "tokenizer.json"), CORPUS)
    np.testing.assert_array_equal(loaded.encode(WORDS), first.encode(WORDS))
    np.testing.assert_array_equal(loaded.bytes_per_token, first.bytes_per_token)
    assert BpeTokenizer.train(Corpus("little", (b"ab ab",), (b"a",)), 1000).vocab < 1000  # says what it has


def test_bpe_counts_one_byte_for_each_byte_token():
    tokenizer = BpeTokenizer.train(CORPUS, 256)
    assert tokenizer.vocab == 256
    assert sorted(tokenizer.to_bytes([index]) for index in range(256)) == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("byte", "did you mean bytes"),
        ("bpe", "bpe:VOCAB"),
        ("bpe:many", "bpe:VOCAB"),
        ("bpe:255", "vocab is 255"),
        ("nowhere/tokenizer.json", "unknown"),
    ],
)
def test_bad_specs_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from(spec, CORPUS)


def test_files_that_are_no_byte_level_tokenizer_are_refused(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable tokenizer.json"):
        BpeTokenizer.load(tmp_path / "broken.json")
    BpeTokenizer.train(CORPUS, 256).save(tmp_path / "lossy.json")
    lossy = json.loads((tmp_path / "lossy.json").read_text())
    del lossy["model"]["vocab"]["a"]
    (tmp_path / "lossy.json").write_text(json.dumps(lossy))
    with pytest.raises(ValueError, match="no token for 1 of 256 bytes, as 97"):
        BpeTokenizer.load(tmp_path / "lossy.json")


def test_bad_text_and_ids_are_named(tokenizer):
    for ids in ([-1], [tokenizer.vocab], [0.5]):
        with pytest.raises(ValueError, match="must be integers in"):
            tokenizer.decode(ids)
    if tokenizer.vocab > 256:
        with pytest.raises(ValueError, match="not UTF-8 at byte 2"):
            tokenizer.encode(b"ab\xff")
