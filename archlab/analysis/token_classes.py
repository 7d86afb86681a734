"""Kinds of tokens, to see whether experts tell them apart."""

import bisect
import re
from collections.abc import Sequence

import numpy as np

CLASSES = ("code", "prose", "digits", "punctuation", "whitespace", "beyond ASCII", "special")

MARKS = frozenset(b"_=()[]{}<>;:+*/\\|&%$#@^~")
KEYWORDS = {b"import", b"from", b"def", b"class", b"return", b"raise", b"yield", b"elif", b"else:", b"try:", b"except",
            b"pass", b"break", b"continue", b"#include", b"const", b"let", b"var", b"func", b"fn", b"public", b"static"}


def token_classes(pieces: Sequence[bytes]) -> np.ndarray:
    """The class of each token of a text, as indices into `CLASSES`.

    A token of no bytes is special (one that begins a text, say), and one with a byte above 127 is beyond ASCII. One of
    blanks only is whitespace. One with a letter is code or prose, as its line is; without one but with a digit it is
    digits; all else is punctuation.

    A line is code where it begins with a word such as `import` or `return`, or where one in ten of its visible
    characters is one of `MARKS`. That is a guess from one line: a comment is prose, and so is a line of code without
    any marks; a short remark in brackets is code.

    Args: pieces: the tokens' own bytes, in the order of the text.
    """
    text = b"".join(pieces)
    ends = [match.end() for match in re.finditer(rb"\n", text)] + [len(text) + 1]
    lines = [_is_code(line) for line in text.split(b"\n")]
    found, start = [], 0
    for piece in pieces:
        visible = start + len(piece) - len(piece.lstrip())
        found.append(_class(piece, lines[bisect.bisect_right(ends, min(visible, len(text)))]))
        start += len(piece)
    return np.array([CLASSES.index(name) for name in found], np.int32)


def _class(piece: bytes, code: bool) -> str:
    if not piece:
        return "special"
    if not piece.isascii():
        return "beyond ASCII"
    if not piece.strip():
        return "whitespace"
    if re.search(rb"[A-Za-z]", piece):
        return "code" if code else "prose"
    return "digits" if re.search(rb"[0-9]", piece) else "punctuation"


def _is_code(line: bytes) -> bool:
    words = line.split()
    visible = b"".join(words)
    return bool(words) and (words[0] in KEYWORDS or 10 * sum(byte in MARKS for byte in visible) >= len(visible))
