"""Continues texts with a model.

    python -m experiments.generate --checkpoint=runs/transformer --prompt="def " --max_new_tokens=100
    python -m experiments.generate --checkpoint=Llama-3.2-1B --prompt="Once upon" --prompt="The" --temperature=0.7
    python -m experiments.generate --model=mamba-small --prompt="def "          # untrained: for its speed alone

--checkpoint is the folder of a training run, one that `archlab.save` wrote, or a Hugging Face checkpoint. Of a run, the
tokenizer is the one it was trained with, unless --tokenizer says otherwise. A Hugging Face checkpoint has its own, and
settings of its own too (generation_config.json), which flags override. Texts go to stdout, a single one as it comes, in
whole characters; the speed goes to stderr.
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
flags.DEFINE_multi_string("prompt", [], "The text to continue. Repeatable: several are run together.")
flags.DEFINE_string("tokenizer", None, "bytes, bpe:VOCAB or the path of a tokenizer.json; by default that of the run.")
flags.DEFINE_integer("max_new_tokens", None, "How many tokens to add; 64 where the checkpoint says nothing.")
flags.DEFINE_float("temperature", None, "0 always takes the likeliest token; 0.8 where the checkpoint says nothing.")
flags.DEFINE_integer("top_k", None, "Draw from this many of the likeliest tokens; 0 for all.")
flags.DEFINE_float("top_p", None, "Draw from the likeliest tokens that together have this probability.")
flags.DEFINE_float("min_p", None, "Draw from tokens at least this many times as likely as the likeliest.")
flags.DEFINE_float("repetition_penalty", None, "Above 1, tokens that the text already has become less likely.")
flags.DEFINE_list("ignore", [], "Settings of a checkpoint's generation_config.json to leave out, as in num_beams.")
flags.DEFINE_integer("seed", 0, "Of the draws, and of the weights of an untrained model.")
SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def main() -> None:
    from flax import nnx

    if not any(FLAGS.prompt):
        raise ValueError("--prompt: it must have at least one character to continue")
    text = load()
    given = {name: FLAGS[name].value for name in SETTINGS if FLAGS[name].value is not None}
    if given.get("top_k") == 0:
        given["top_k"] = None
    rngs, marks = nnx.Rngs(FLAGS.seed), [time.perf_counter()]
    shown = ["" if text.reads else prompt for prompt in FLAGS.prompt]
    if len(shown) > 1:
        for prompt, written in zip(shown, text.generate(FLAGS.prompt, rngs=rngs, **given)):
            print(prompt + written)
        print(f"{len(shown)} texts after {time.perf_counter() - marks[0]:.2f} s, compiling included", file=sys.stderr)
        return
    for piece in text.stream(FLAGS.prompt[0], rngs=rngs, **given):
        marks.append(time.perf_counter())  # a piece is nearly always one token
        sys.stdout.write(shown.pop() + piece if shown else piece)  # bad settings are told before anything is printed
        sys.stdout.flush()
    print(*shown)
    if len(marks) > 1:  # else EOS came at once
        gaps = [after - before for before, after in zip(marks[1:], marks[2:])]
        speed = f", then {1 / statistics.median(gaps):.0f} tokens/s (median)" if gaps else ""
        print(f"first token after {marks[1] - marks[0]:.2f} s, compiling included{speed}", file=sys.stderr)


def load():
    """The `TextModel` that the flags name."""
    from flax import nnx

    import archlab
    from archlab import hub
    from archlab.data import load_corpus, tokenizer_from
    from archlab.hub.tokenizer import CheckpointTokenizer
    from archlab.inference.text import TextModel

    if (FLAGS.checkpoint is None) == (FLAGS.model is None):
        raise ValueError("give either --checkpoint=FOLDER or --model=NAME")
    if FLAGS.checkpoint is not None and hub.is_huggingface(FLAGS.checkpoint) and not FLAGS.tokenizer:
        return hub.load_text(FLAGS.checkpoint, ignore=FLAGS.ignore)
    if FLAGS.checkpoint is not None:
        model = common.load_checkpoint(FLAGS.checkpoint)
        saved = json.loads((Path(FLAGS.checkpoint) / "config.json").read_text())  # of a model alone: without `data`
        if (Path(FLAGS.checkpoint) / "tokenizer.json").is_file() and not FLAGS.tokenizer:  # `convert` brought it along
            tokenizer = CheckpointTokenizer.load(FLAGS.checkpoint)
            return TextModel(model, tokenizer, eos=tokenizer.eos)
    else:
        model, saved = archlab.create_model(common.model_config(FLAGS.model, []), nnx.Rngs(FLAGS.seed)), {}
    spec = FLAGS.tokenizer or saved.get("tokenizer", "bytes")
    learned_from = load_corpus(saved.get("data", "stdlib")) if spec.startswith("bpe:") else None
    tokenizer = tokenizer_from(spec, learned_from)
    if tokenizer.vocab > model.config.vocab:
        raise ValueError(f"the tokenizer has {tokenizer.vocab} tokens, more than the model's {model.config.vocab}")
    return TextModel(model, tokenizer)


if __name__ == "__main__":
    common.run(main)
