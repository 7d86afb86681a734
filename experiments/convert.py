"""Turns a model from one kind of folder into another.

    python -m experiments.convert --from=Llama-3.2-1B --to=mine                            # into our own format
    python -m experiments.convert --from=runs/transformer --to=out --format=huggingface    # for transformers to load
    python -m experiments.convert --from=Llama-3.2-1B --to=out --format=huggingface --dtype=bfloat16 --check

--from is a folder of `archlab.save`, of a training run, or a Hugging Face checkpoint. The tokenizer and the settings of
generation go along. --check loads what was written again, here and, where a side is a Hugging Face folder and
transformers is installed (pip install archlab[interop]), there too; it runs both in float32 on random ids, prints the
largest difference of the logits beside their size, and fails above 1e-3 of it.
"""

import json
import shutil
import sys
from pathlib import Path

from absl import flags

from experiments import common

FLAGS = flags.FLAGS

flags.DEFINE_string("from", None, "The folder to read.", required=True)
flags.DEFINE_string("to", None, "The folder to write; it is made if need be.", required=True)
flags.DEFINE_enum("format", "archlab", ["archlab", "huggingface"], "What to write.")
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of the weights; as they are without it.")
flags.DEFINE_bool("check", False, "Compare the logits of what was read and what was written.")
common.define_code()

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
              "merges.txt", "generation_config.json", "chat_template.jinja")
KEPT = ("model_type", "max_position_embeddings", "bos_token_id", "decoder_start_token_id", "eos_token_id",
        "pad_token_id")
ROWS, LENGTH, TOLERANCE = 2, 64, 1e-3


def main() -> None:
    import archlab
    from archlab import hub
    from archlab.analysis.accounts import count_parameters

    source, target = Path(FLAGS["from"].value), Path(FLAGS.to)
    if source.resolve() == target.resolve():
        raise ValueError(f"--to={target} is the folder that is read: give another")
    model = common.load_checkpoint(source, dtype=FLAGS.dtype)
    if FLAGS.format == "huggingface":
        fields = json.loads((source / "config.json").read_text()) if hub.is_huggingface(source) else {}
        hub.save(model, target, {name: fields[name] for name in KEPT if fields.get(name) is not None})
    else:
        archlab.save(model, target)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    print(f"{target}: {FLAGS.format}, {count_parameters(model.config).total:,} parameters")
    if FLAGS.check:
        check(model, source, target)


def check(model, source: Path, target: Path) -> None:
    """Prints how far the logits of what was written are from those of `model`, here and in transformers, and those of
    the source where its weights were kept as they were. ValueError where that is too far."""
    import numpy as np

    from archlab.hub import is_huggingface
    from archlab.hub.family import each
    from archlab.layers.positions import LearnedPositions
    from archlab.layers.weights import merge, split

    structure, params, rest = split(model)
    model = merge(structure, {path: array.astype("float32") for path, array in params.items()}, rest)
    longest = min([LENGTH, *(positions.length for positions in each(model.config, LearnedPositions))])
    ids = np.random.default_rng(0).integers(0, model.config.vocab, (ROWS, longest))
    wanted = _by_archlab(model, ids)
    said = {f"{target} in archlab": _by_archlab(common.load_checkpoint(target, dtype="float32"), ids)}
    for folder in [target] if FLAGS.dtype else [source, target]:
        if is_huggingface(folder) and (logits := _by_transformers(folder, ids)) is not None:
            said[f"{folder} in transformers"] = logits
    size, failed = np.abs(wanted).max(), []
    for name, logits in said.items():
        difference = np.abs(logits - wanted).max() / size
        print(f"{name}: the largest difference of logits is {difference:.1e} of the largest, {size:.3g}")
        failed += [] if difference <= TOLERANCE else [name]
    if failed:
        raise ValueError(f"--check: the logits of {', '.join(failed)} are not those of the model within {TOLERANCE:g}")


def _by_archlab(model, ids):
    import numpy as np

    memory = model.encode(ids)[0] if hasattr(model, "encode") else None
    return np.asarray(model(ids, memory=memory).logits)


def _by_transformers(folder: Path, ids):
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"{folder} is not compared with transformers: {error}", file=sys.stderr)
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    both = config.is_encoder_decoder
    kind = transformers.AutoModelForSeq2SeqLM if both else transformers.AutoModelForCausalLM
    attention = "sdpa" if config.model_type == "falcon" else "eager"  # Falcon's eager form adds ALiBi twice
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention,
                                 experts_implementation="eager").eval()  # grouped products want sizes that divide by 4
    ids = torch.tensor(ids)
    with torch.no_grad():
        return model(ids, **({"decoder_input_ids": ids} if both else {}), use_cache=False).logits.numpy()


if __name__ == "__main__":
    common.run(main)
