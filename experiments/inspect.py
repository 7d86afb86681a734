"""Shows where a mixture of experts sends each token, in one HTML file that needs no network.

    python -m experiments.inspect --checkpoint=runs/moe
    python -m experiments.inspect --checkpoint=runs/moe --text="def f(x): return 42  # and why" --out=f.html
    python -m experiments.inspect --checkpoint=OLMoE-1B-7B --file=notes.txt

--checkpoint is the folder of a training run, one that `archlab.save` wrote, or a Hugging Face checkpoint. The text is
that of --text, of --file, or else the first of the validation side of --data, by default the corpus of the run.

The page has the text coloured by expert, layer by layer; load, entropy and dropped choices of every layer; which
experts are chosen together; which kinds of tokens each likes; and, of a run's folder, the load over training and the
experts that collapsed.

Cost: one pass over --rows times --context tokens, two where a capacity drops some; seconds for a tiny model.
"""

import json
from pathlib import Path

from absl import flags

from experiments import common

FLAGS = flags.FLAGS

common.define_checkpoint()
flags.DEFINE_string("text", None, "The text to look at.")
flags.DEFINE_string("file", None, "Instead: a file that holds it.")
flags.DEFINE_string("data", None, "Instead: a corpus, whose validation side is read; by default that of the run.")
flags.DEFINE_string("tokenizer", None, "bytes, bpe:VOCAB or the path of a tokenizer.json; by default that of the run.")
flags.DEFINE_integer("context", None, "Tokens a row; by default that of the run, or 256.")
flags.DEFINE_integer("rows", 8, "The most rows to look at.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of what the training form draws.")
flags.DEFINE_string("out", "runs/inspect.html", "The page to write.")


def main() -> None:
    import jax

    from archlab import hub
    from archlab.analysis.expert_page import expert_page
    from archlab.analysis.experts import look
    from archlab.training.metrics import read_rows

    if FLAGS.checkpoint is None:
        raise ValueError("give --checkpoint=FOLDER")
    if sum(flag is not None for flag in (FLAGS.text, FLAGS.file, FLAGS.data)) > 1:
        raise ValueError("give one of --text, --file and --data")
    folder = Path(FLAGS.checkpoint)
    model = common.load_checkpoint(FLAGS.checkpoint)
    saved = {} if hub.is_huggingface(folder) else json.loads((folder / "config.json").read_text())
    context = FLAGS.context or saved.get("context", 256)
    tokenizer, documents, source = read(folder, saved, FLAGS.rows * context)
    batch = batch_of(documents, tokenizer, context, FLAGS.rows)
    pieces = pieces_of(batch.ids[batch.segments > 0].tolist(), tokenizer, folder)
    if batch.ids.max() >= model.config.vocab:
        raise ValueError(f"the tokenizer gives id {batch.ids.max()}, and the model's vocab is {model.config.vocab}")
    layers = look(model, batch, jax.random.key(FLAGS.seed))
    page = expert_page(f"Experts of {folder.absolute().name}", layers, pieces, batch.segments > 0,
                       read_rows(folder / "experts.jsonl"),
                       {"checkpoint": FLAGS.checkpoint, "text": source, "context": context})
    Path(FLAGS.out).parent.mkdir(parents=True, exist_ok=True)
    print(f"{len(pieces):,} tokens through {len(layers)} layers with experts: {page.save(FLAGS.out)}")


def read(folder: Path, saved: dict, count: int):
    """The tokenizer; documents [bytes] of about `count` tokens at most; and words for where they are from."""
    from archlab.data import load_corpus, tokenizer_from
    from archlab.hub.tokenizer import CheckpointTokenizer

    name = FLAGS.data or saved.get("data", "stdlib")
    if FLAGS.tokenizer is None and (folder / "tokenizer.json").is_file():
        tokenizer = CheckpointTokenizer.load(folder)
    elif FLAGS.tokenizer is None and not saved:
        raise ValueError(f"{folder} has no tokenizer.json: give --tokenizer")
    else:
        spec = FLAGS.tokenizer or saved.get("tokenizer", "bytes")
        tokenizer = tokenizer_from(spec, load_corpus(saved.get("data", name)) if spec.startswith("bpe:") else None)
    if FLAGS.text is not None:
        return tokenizer, [FLAGS.text.encode()], "--text"
    if FLAGS.file is not None:
        if not Path(FLAGS.file).is_file():
            raise ValueError(f"there is no file {FLAGS.file}")
        return tokenizer, [Path(FLAGS.file).read_bytes()], FLAGS.file
    documents, longest = [], 16 * count  # bytes: few tokens are longer than 16
    for document in load_corpus(name).validation:
        documents.append(document[:longest])
        longest -= len(documents[-1])
        if not longest:
            break
    return tokenizer, documents, f"{name}, validation side"


def batch_of(documents: list[bytes], tokenizer, context: int, rows: int):
    """Documents end to end in rows of `context`, padded at the end."""
    import numpy as np

    from archlab.data import Batch, ByteTokenizer

    ids, segments = [], []
    for number, document in enumerate(documents, 1):
        if len(ids) >= rows * context:
            break
        text = document if isinstance(tokenizer, ByteTokenizer) else document.decode(errors="replace")
        found = tokenizer.encode(text)[: rows * context - len(ids)].tolist()
        ids, segments = ids + found, segments + [number] * len(found)
    if not ids:
        raise ValueError("the text is empty: there must be at least one token to look at")
    shaped = lambda values: np.pad(np.array(values, np.int32), (0, -len(ids) % context)).reshape(-1, context)
    ids, segments = shaped(ids), shaped(segments)
    return Batch(ids, np.zeros_like(ids), segments, np.zeros(ids.shape, np.float32))


def pieces_of(ids: list[int], tokenizer, folder: Path) -> list[bytes]:
    """The bytes of each token; none of a special one of the checkpoint's."""
    from archlab.data.tokenizers import BpeTokenizer

    if hasattr(tokenizer, "to_bytes"):
        return [tokenizer.to_bytes([token]) for token in ids]
    try:
        exact = BpeTokenizer.load(folder / "tokenizer.json")
    except ValueError:  # not byte-level; what comes before a token decides about the space between the two
        return [tokenizer.decode([token], ids[max(0, t - 4):t]).encode() for t, token in enumerate(ids)]
    return [exact.to_bytes([token]) if tokenizer.decode([token]) else b"" for token in ids]


if __name__ == "__main__":
    common.run(main)
