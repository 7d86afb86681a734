"""Continues a text with a model, as it comes.

    python -m experiments.generate --checkpoint=runs/transformer --prompt="def " --max_new_tokens=100
    python -m experiments.generate --model=mamba-small --prompt="def "          # untrained: for its speed alone

--checkpoint is the folder of a training run or one that `archlab.save` wrote. Of a run, the tokenizer is the one it was
trained with, unless --tokenizer says otherwise. The text goes to stdout, in whole characters; the time to the first
token and the tokens a second after it go to stderr.
"""

import json
import statistics
import sys
import time
from pathlib import Path

from absl import flags

from experiments import common

FLAGS = flags.FLAGS

common.define_checkpoint()
flags.DEFINE_string("model", None, "Instead: a name of the zoo or a Python file with a CONFIG, untrained.")
flags.DEFINE_string("prompt", None, "The text to continue.")
flags.DEFINE_string("tokenizer", None, "bytes, bpe:VOCAB or the path of a tokenizer.json; by default that of the run.")
flags.DEFINE_integer("max_new_tokens", 100, "How many tokens to add.")
flags.DEFINE_float("temperature", 0.8, "0 always takes the likeliest token.")
flags.DEFINE_integer("top_k", None, "Draw from this many of the likeliest tokens.")
flags.DEFINE_float("top_p", None, "Draw from the likeliest tokens that together have this probability.")
flags.DEFINE_integer("seed", 0, "Of the draws, and of the weights of an untrained model.")


def main() -> None:
    import numpy as np
    from flax import nnx

    from archlab.data import stream_decode
    from archlab.inference.generation import stream
    from archlab.layers.repeat import unstack

    if not FLAGS.prompt:
        raise ValueError(f"--prompt={FLAGS.prompt or ''}: it must have at least one character to continue")
    model, tokenizer = load()
    if tokenizer.vocab > model.config.vocab:
        raise ValueError(f"the tokenizer has {tokenizer.vocab} tokens, more than the model's {model.config.vocab}")
    prompt = np.asarray(tokenizer.encode(FLAGS.prompt))[None]
    model = unstack(model)
    marks = [time.perf_counter()]

    def ids():
        unknown = tokenizer.encode("?")[0]  # for ids that only the model has
        for token in stream(model, prompt, FLAGS.max_new_tokens, FLAGS.temperature, FLAGS.top_k, FLAGS.top_p,
                            nnx.Rngs(FLAGS.seed)):
            marks.append(time.perf_counter())
            yield token[0] if token[0] < tokenizer.vocab else unknown

    pieces = stream_decode(tokenizer, ids())
    first = next(pieces, "")  # bad settings are told before anything is printed
    sys.stdout.write(FLAGS.prompt + first)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    gaps = [after - before for before, after in zip(marks[1:], marks[2:])]
    speed = f", then {1 / statistics.median(gaps):.0f} tokens/s (median)" if gaps else ""
    print(f"first token after {marks[1] - marks[0]:.2f} s, compiling included{speed}", file=sys.stderr)


def load():
    """The model that the flags name, and its tokenizer."""
    from flax import nnx

    import archlab
    from archlab.data import load_corpus, tokenizer_from

    if (FLAGS.checkpoint is None) == (FLAGS.model is None):
        raise ValueError("give either --checkpoint=FOLDER or --model=NAME")
    if FLAGS.checkpoint is not None:
        model = common.load_checkpoint(FLAGS.checkpoint)
        saved = json.loads((Path(FLAGS.checkpoint) / "config.json").read_text())  # of a model alone: without `data`
    else:
        model, saved = archlab.create_model(common.model_config(FLAGS.model, []), nnx.Rngs(FLAGS.seed)), {}
    spec = FLAGS.tokenizer or saved.get("tokenizer", "bytes")
    learned_from = load_corpus(saved.get("data", "stdlib")) if spec.startswith("bpe:") else None
    return model, tokenizer_from(spec, learned_from)


if __name__ == "__main__":
    common.run(main)
