"""Tokenizers: bytes to ids and back, without loss.

Both kinds have `vocab` (V), `bytes_per_token [V]`, `encode`, `to_bytes`, `decode`, `stream` and no special tokens, so
that the bytes of the ids of a document sum to its length and losses can be told in bits per byte. (Those of imported
checkpoints need not be so: `archlab.hub.tokenizer`.)
"""

import codecs
import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from archlab.data.corpora import Corpus


def _checked(ids, vocab: int) -> np.ndarray:
    ids = np.asarray(ids).reshape(-1)
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab):
        raise ValueError(f"ids lie in [{ids.min()}, {ids.max()}] ({ids.dtype}); they must be integers in [0, {vocab})")
    return ids


class _Lossless:
    """What follows from `to_bytes`. `after`, the ids before these, changes nothing here as it may elsewhere."""

    def decode(self, ids, after=()) -> str:
        """The text of ids [T], with U+FFFD for what is not UTF-8."""
        return self.to_bytes(ids).decode(errors="replace")

    def stream(self, ids: Iterable[int], after=()) -> Iterator[str]:
        """Yields text as ids arrive, never part of a character; the pieces joined are `decode` of all."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for index in ids:
            if text := decoder.decode(self.to_bytes([index])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(_Lossless):
    """Every byte is its own token: ids 0 to 255. Nothing is unknown and nothing is lost."""

    @property
    def vocab(self) -> int:
        return 256

    @property
    def bytes_per_token(self) -> np.ndarray:
        return np.ones(256, np.int32)

    def encode(self, text: bytes | str) -> np.ndarray:
        """The bytes of `text` (UTF-8 if it is a str) as int32 [T]."""
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int32)

    def to_bytes(self, ids) -> bytes:
        """The bytes of ids [T]. Raises ValueError for an id outside the vocabulary."""
        return _checked(ids, 256).astype(np.uint8).tobytes()


@dataclasses.dataclass(frozen=True)
class Symbols:
    """The tokens of a task, which stand for no text: ids 0 to vocab - 1, written as numbers. Each counts as one byte,
    so that what is told in bits per byte of a text is in bits per answer of a task."""

    vocab: int

    @property
    def bytes_per_token(self) -> np.ndarray:
        return np.ones(self.vocab, np.int32)

    def encode(self, text: bytes | str) -> np.ndarray:
        """The ids [T] of numbers with spaces between them. Raises ValueError for what is no symbol."""
        words = (text if isinstance(text, str) else text.decode()).split()
        if not all(word.isascii() and word.isdigit() for word in words):
            raise ValueError(f"{text!r} is no row of symbols: write numbers below {self.vocab}, as 3 1 4")
        return _checked([int(word) for word in words], self.vocab).astype(np.int32)

    def decode(self, ids, after=()) -> str:
        """The numbers of ids [T], each with a space behind it."""
        return "".join(f"{index} " for index in _checked(ids, self.vocab))

    def stream(self, ids: Iterable[int], after=()) -> Iterator[str]:
        """Yields the numbers as ids arrive."""
        for index in ids:
            yield self.decode([index])


class BpeTokenizer(_Lossless):
    """Byte-level byte-pair encoding (Sennrich et al. 2016; over bytes as in GPT-2, Radford et al. 2019).

    Kept in the tokenizer.json format of the `tokenizers` library; `BpeTokenizer.train` makes one from a corpus and
    `BpeTokenizer.load` reads one. `vocab` is the number of ids, which a small corpus may leave below what was asked.
    """

    def __init__(self, tokenizer, name: str = "tokenizer"):
        """Wraps a `tokenizers.Tokenizer`. Raises ValueError if it lacks a token for some byte: it could lose text."""
        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        tokens = tokenizer.get_vocab(with_added_tokens=True)
        missing = [byte for character, byte in byte_of.items() if character not in tokens]
        if missing:
            raise ValueError(f"{name} is not byte-level: no token for {len(missing)} of 256 bytes, as {missing[0]}")
        self._tokenizer = tokenizer
        self._pieces = [b""] * (max(tokens.values()) + 1)
        for token, index in tokens.items():
            known = all(character in byte_of for character in token)  # added tokens stand for themselves
            self._pieces[index] = bytes(byte_of[character] for character in token) if known else token.encode()
        self.vocab = len(self._pieces)
        self.bytes_per_token = np.array([len(piece) for piece in self._pieces], np.int32)

    @classmethod
    def train(cls, corpus: Corpus, vocab: int) -> "BpeTokenizer":
        """Learns at most `vocab` tokens from the training side of `corpus`; the same corpus gives the same tokens."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        if vocab < 256:
            raise ValueError(f"vocab is {vocab}; byte-level BPE needs 256 or more, a token for every byte")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=list(_byte_characters()), show_progress=False)
        tokenizer.train_from_iterator((_text(document) for document in corpus.train), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> "BpeTokenizer":
        """Reads a byte-level tokenizer.json. Raises ValueError if it is not one."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
        return cls(tokenizer, str(path))

    def save(self, path: str | Path):
        self._tokenizer.save(str(path))

    def encode(self, text: bytes | str) -> np.ndarray:
        """The ids of `text` as int32 [T]. Raises ValueError for bytes that are not UTF-8."""
        return np.array(self._tokenizer.encode(_text(text), add_special_tokens=False).ids, np.int32)

    def to_bytes(self, ids) -> bytes:
        """The bytes of ids [T]. Raises ValueError for an id outside the vocabulary."""
        return b"".join(self._pieces[index] for index in _checked(ids, self.vocab))


def tokenizer_from(spec: str, corpus: Corpus) -> ByteTokenizer | BpeTokenizer | Symbols:
    """The tokenizer that `spec` names: `bytes`, `bpe:VOCAB` (learned from `corpus`), or a path to a tokenizer.json. A
    task has symbols of its own, whatever `spec` is.

    Raises:
      ValueError: none of the three.
    """
    if not isinstance(corpus, Corpus) and corpus is not None:
        return Symbols(corpus.vocab)
    if spec == "bytes":
        return ByteTokenizer()
    kind, _, size = spec.partition(":")
    if kind == "bpe" and size.isascii() and size.isdigit():
        return BpeTokenizer.train(corpus, int(size))
    if Path(spec).is_file():
        return BpeTokenizer.load(spec)
    near = difflib.get_close_matches(kind, ["bytes", "bpe"])
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"tokenizer {spec!r} is unknown: use bytes, bpe:VOCAB or the path of a tokenizer.json{hint}")


def _text(text: bytes | str) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"text of {len(text)} bytes is not UTF-8 at byte {error.start}; use tokenizer bytes") from None


def _byte_characters() -> str:
    """GPT-2's 256 printable characters, one per byte: itself where it prints, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return "".join(chr(byte) if byte in printable else chr(next(spare)) for byte in range(256))
