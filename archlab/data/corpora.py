"""Corpora: where text comes from, as documents of bytes with a fixed split.

A document is data and nothing else: it is never executed, imported or followed. Whole corpora are held in memory.
"""

import ast
import dataclasses
import difflib
import glob
import hashlib
import os
import sysconfig
from pathlib import Path

SCHEMES = ("stdlib", "text:GLOB", "tfds:NAME[/CONFIG]", "task:NAME")

# Left out of `stdlib`: the tests, which are twice as long as all the rest and which many systems do not install;
# the encodings, which are generated tables and so nearly copies of one another on both sides of the split;
# installed packages; and files written when Python was built, which name that machine's paths.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
_STDLIB_GENERATED = ("_sysconfigdata", "config-")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of a training and a validation side.

    Raises:
      ValueError: a side has no document, or a document has no bytes.
    """

    name: str
    train: tuple[bytes, ...] = dataclasses.field(repr=False)
    validation: tuple[bytes, ...] = dataclasses.field(repr=False)

    def __post_init__(self):
        for side in ("train", "validation"):
            documents = getattr(self, side)
            if not documents or not all(documents):
                raise ValueError(
                    f"corpus {self.name!r}: {side} has {len(documents)} documents, {documents.count(b'')} of them "
                    "empty; each side needs at least one, and none that is empty"
                )


def load_corpus(spec: str = "stdlib"):
    """Loads the corpus that `spec` names. The split depends on the names of the documents alone, not on the machine.

    - `stdlib`: source and documentation of the running Python's own standard library; each file is a document, and
      so is each of pydoc's help topics. About 5% of the documents, chosen by a hash of their names, validate.
    - `text:GLOB`: every file that matches (`**` for any depth) is a document, split by a hash of its path below the
      first wildcard. One single file is cut in two: its last tenth validates.
    - `tfds:NAME[/CONFIG]`: a TensorFlow Datasets text dataset in array_record format from $TFDS_DATA_DIR or
      ~/tensorflow_datasets, prepared (downloaded) if it is not there. Its split `validation`, else `test`, else the
      last 5% of `train` validates.
    - `task:NAME`: not a `Corpus` but a `Task` (archlab.data.tasks), which makes rows of its own length; what takes
      batches from one takes them from the other.

    Raises:
      ValueError: an unknown scheme, nothing found, or nothing in what was found.
    """
    scheme, _, rest = spec.partition(":")
    if spec == "stdlib":
        return _stdlib()
    if scheme == "text" and rest:
        return _text(spec, rest)
    if scheme == "tfds" and rest:
        return _tfds(spec, rest)
    if scheme == "task" and rest:
        from archlab.data.tasks import get_task  # late: tasks are made of batches, which are made of corpora

        return get_task(rest)
    hint = _near(scheme, ["stdlib", "text", "tfds", "task"])
    raise ValueError(f"corpus {spec!r} is unknown: use one of {', '.join(SCHEMES)}{hint}")


def _stdlib() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = {}
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in _STDLIB_SKIPPED and not n.startswith(_STDLIB_GENERATED)]
        for path in (Path(folder, name) for name in files if not name.startswith(_STDLIB_GENERATED)):
            if path.suffix in (".py", ".txt", ".rst") and path.is_file():
                document = path.read_bytes()
                if document and document.decode(errors="ignore").encode() == document:  # whole UTF-8
                    documents[path.relative_to(root).as_posix()] = document
    documents |= _topics(documents.pop("pydoc_data/topics.py", b""))
    if not documents:
        raise ValueError(f"corpus 'stdlib' is empty: {root} holds no readable .py, .txt or .rst file; use text:GLOB")
    return Corpus("stdlib", *_split_by_name("stdlib", documents))


def _topics(source: bytes) -> dict[str, bytes]:
    """The help topics in pydoc's one long dict, as text: a literal that is read, not run."""
    values = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    topics = [ast.literal_eval(value) for value in values if isinstance(value, ast.Dict)]
    return {f"pydoc_data/topics/{name}": text.encode() for topic in topics for name, text in topic.items() if text}


def _text(spec: str, pattern: str) -> Corpus:
    pattern = os.path.expanduser(pattern)
    fixed = []  # the parts before the first wildcard: what the user named in full, and the root of all names
    for part in Path(pattern).parts:
        if any(character in part for character in "*?["):
            break
        fixed.append(part)
    root = Path(*fixed).resolve()
    files = {}
    for match in sorted(glob.glob(pattern, recursive=True)):
        path = Path(match).resolve()
        if path.is_file() and path.is_relative_to(root):  # a link that leads out of the root is not followed
            files[path.relative_to(root).as_posix()] = path
    if not files:
        raise ValueError(f"corpus {spec!r} is missing: no file under {root} matches; give a file or a quoted glob")
    documents = {name: path.read_bytes() for name, path in files.items()}
    documents = {name: document for name, document in documents.items() if document}
    if not documents:
        raise ValueError(f"corpus {spec!r} is empty: the {len(files)} files that match have no bytes")
    if len(documents) > 1:
        return Corpus(spec, *_split_by_name(spec, documents))
    (document,) = documents.values()
    cut = len(document) * 9 // 10
    while cut < len(document) and document[cut] & 0xC0 == 0x80:  # never inside a UTF-8 character
        cut += 1
    if not 0 < cut < len(document):
        raise ValueError(f"corpus {spec!r} has {len(document)} bytes, too few to give a tenth to validation")
    return Corpus(spec, (document[:cut],), (document[cut:],))


def _tfds(spec: str, name: str) -> Corpus:
    import tensorflow_datasets as tfds  # late: half a second, and only this scheme needs it
    from absl import logging

    data_dir = os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            builder.download_and_prepare(file_format="array_record")
        count = builder.info.splits["train"].num_examples
        cut = min(count * 95 // 100, count - 1)
        held_out = [split for split in ("validation", "test") if split in builder.info.splits]
        wanted = ("train", held_out[0]) if held_out else (f"train[:{cut}]", f"train[{cut}:]")
        sources = [builder.as_data_source(split) for split in wanted]
    except Exception as error:  # TFDS raises types of its own, plain ones and those of its transports
        known = tfds.list_builders(with_community_datasets=False)
        reason = str(error).split("\n")[0] + _near(name.split("/")[0], known)
        raise ValueError(
            f"corpus {spec!r} cannot be read or downloaded ({type(error).__name__}: {reason}); "
            f"it must be prepared in array_record format with a split 'train' under TFDS_DATA_DIR, here {data_dir}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    features = builder.info.features
    strings = [key for key, feature in features.items() if feature.shape == () and feature.np_dtype == object]
    if "text" not in strings and len(strings) != 1:
        raise ValueError(f"corpus {spec!r} has string features {sorted(strings)}; it needs one named 'text' or "
                         "exactly one")
    key = "text" if "text" in strings else strings[0]
    return Corpus(spec, *(tuple(filter(None, (bytes(example[key]) for example in source))) for source in sources))


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _split_by_name(spec: str, documents: dict[str, bytes]) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Splits two or more documents in the order of their names, about 5% to validation; neither side is empty."""
    if len(documents) < 2:
        raise ValueError(f"corpus {spec!r} has {len(documents)} document, and a split by name needs two")
    names = sorted(documents)
    place = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names}
    validation = {name for name in names if place[name] < 0.05} or {min(names, key=place.get)}
    if len(validation) == len(names):
        validation.remove(max(names, key=place.get))
    return (
        tuple(documents[name] for name in names if name not in validation),
        tuple(documents[name] for name in names if name in validation),
    )
