"""The tokenizer of a checkpoint folder: its tokenizer.json, read by the `tokenizers` library, which runs no code."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

TOKENIZER, CONFIG, LEGACY = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
HELD = 8  # tokens: no character is made of more, so what is then still broken stays broken


class CheckpointTokenizer:
    """Text to ids and back, as transformers does it. Text may be lost (an unknown character, a normalised space).

    vocab: one more than the greatest id; the model may have more or fewer. bos, eos: the ids of the tokens that begin
    and end a text, None where the folder names none.

    Whether a text gets a BOS or an EOS is said by the post-processor of tokenizer.json alone, as in transformers 5;
    `add_bos_token` and `add_eos_token` of tokenizer_config.json only told how to make that file, and are not read.
    """

    def __init__(self, tokenizer, names: dict | None = None):
        """Wraps a `tokenizers.Tokenizer`. names: {"eos_token": "</s>", ...}: tokens that are special too."""
        from tokenizers import AddedToken

        tokenizer.no_truncation()  # files may ask for both, as a training run left them
        tokenizer.no_padding()
        named = {name: _content(token) for name, token in (names or {}).items() if name in NAMES and token}
        more = [token for name in ("additional_special_tokens", "extra_special_tokens")
                for token in _listed((names or {}).get(name))]
        known = [token for token in [*named.values(), *more] if tokenizer.token_to_id(token) is not None]
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in known if t not in special])
        self._tokenizer = tokenizer
        self.vocab = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos, self.eos = (tokenizer.token_to_id(named.get(name, "")) for name in ("bos_token", "eos_token"))

    @classmethod
    def load(cls, folder: str | Path) -> "CheckpointTokenizer":
        """Reads tokenizer.json and, where there, tokenizer_config.json. Raises ValueError where that cannot be."""
        from tokenizers import Tokenizer

        path = Path(folder) / TOKENIZER
        if not path.is_file():
            raise ValueError(f"{folder} has no {TOKENIZER}, so it has no text: give ids to archlab.generate, or have "
                             "transformers write one (AutoTokenizer.from_pretrained(...).save_pretrained(...))")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a readable {TOKENIZER}: {error}") from error
        return cls(tokenizer, read_json(folder, LEGACY) | read_json(folder, CONFIG))

    def encode(self, text: str, special: bool = True) -> np.ndarray:
        """The ids of `text` as int32 [T]; special tokens written out in it are found.

        Args: special: whether to add what the checkpoint wants around a text (BOS, EOS).
        """
        return np.array(self._tokenizer.encode(text, add_special_tokens=special).ids, np.int32)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name, None where there is none."""
        return self._tokenizer.token_to_id(token)

    def decode(self, ids, after: Sequence[int] = ()) -> str:
        """The text of ids [T]; special tokens, and ids that only the model has, are none.

        Args: after: the ids before them, which decide about the space between the two.
        """
        before = self._text(after)
        return self._text([*after, *ids])[len(before):]

    def stream(self, ids: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """Yields text as ids arrive, never part of a character; the pieces joined are `decode` of all where that has no
        broken characters. Each piece is decoded after the one before it, so that spaces between them stay."""
        last, held = list(after), []
        for index in ids:
            held.append(index)
            text = self.decode(held, last)
            if text and (not text.endswith("\ufffd") or len(held) >= HELD):
                yield text
                last, held = held, []
        if held and (text := self.decode(held, last)):
            yield text

    def _text(self, ids) -> str:
        ids = [int(index) for index in ids]
        if any(index < 0 for index in ids):
            raise ValueError(f"ids reach down to {min(ids)}: must not be negative")
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def read_json(folder: str | Path, name: str) -> dict:
    """The dictionary in a folder's file, empty where there is no such file. Raises ValueError for anything else."""
    path = Path(folder) / name
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: must be a dictionary")
    return values


def _content(token: str | dict) -> str:
    """The text of a token, which may be written with its properties."""
    return token["content"] if isinstance(token, dict) else token


def _listed(tokens) -> list[str]:
    """Tokens written as a list, or as a dictionary by name."""
    return [_content(token) for token in (tokens.values() if isinstance(tokens, dict) else tokens or [])]
