"""Text from a checkpoint folder: model, tokenizer, and the settings it is meant to be used with.

    text = archlab.hub.load_text("Llama-3.2-1B-Instruct")
    text.generate("Once upon a time", max_new_tokens=50, temperature=0.7)
"""

from collections.abc import Sequence
from pathlib import Path

from archlab.encoder_decoder import EncoderDecoder
from archlab.hub.checkpoint import CONFIG, load
from archlab.hub.tokenizer import CheckpointTokenizer, read_json
from archlab.inference.text import TextModel

SETTINGS = "generation_config.json"

# Settings that would change the text and that we do not have, with the value that changes nothing (null never does).
UNSUPPORTED = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "penalty_alpha": 0, "dola_layers": None,
    "guidance_scale": 1, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1,
    "typical_p": 1, "top_h": None, "epsilon_cutoff": 0, "eta_cutoff": 0, "exponential_decay_length_penalty": None,
    "min_length": 0, "min_new_tokens": 0, "max_time": None, "stop_strings": [], "bad_words_ids": [],
    "suppress_tokens": [], "begin_suppress_tokens": [], "sequence_bias": {}, "force_words_ids": [], "constraints": [],
    "watermarking_config": None, "token_healing": False,
}


def load_text(folder: str | Path, dtype=None, mesh=None, ignore: Sequence[str] = ()) -> TextModel:
    """The model of a Hugging Face checkpoint folder with its tokenizer and its settings of generation.

    Args: dtype, mesh: as for `archlab.load`. ignore: settings of generation_config.json to leave out.
    Raises: ValueError for a folder without tokenizer.json; for settings that are not supported, all of them listed; and
      as `archlab.load`.
    """
    tokenizer = CheckpointTokenizer.load(folder)
    values = _written(folder, ignore)
    settings = settings_of(values, tokenizer)
    model = load(folder, dtype, mesh)
    vocab, start = model.config.vocab, values.get("decoder_start_token_id")
    settings["eos"] = [index for index in settings["eos"] if 0 <= index < vocab]  # the others are never said
    settings["top_k"] = settings["top_k"] and min(settings["top_k"], vocab)
    if isinstance(model.config, EncoderDecoder):
        if start not in (None, model.config.start):
            raise ValueError(f"{folder}: decoder_start_token_id = {start} is not the {model.config.start} of {CONFIG}")
    elif settings.pop("first") is not None:
        raise ValueError(f"{folder}: forced_bos_token_id is for encoder-decoders")
    return TextModel(model, tokenizer, **settings)


def settings_of(values: dict, tokenizer: CheckpointTokenizer) -> dict:
    """The fields of a generation_config.json as arguments of `TextModel`. As in transformers a text is greedy unless
    `do_sample` is true, and drawn from 50 tokens where `top_k` is not written."""
    wrong = [f"{name} = {values[name]!r}" for name, neutral in UNSUPPORTED.items()
             if values.get(name) is not None and values[name] != neutral]
    if wrong:
        raise ValueError(f"these settings of {SETTINGS} are not supported: {', '.join(wrong)}; to go on without them, "
                         "name them in ignore")

    def take(name, default=None, off=None):
        value = default if values.get(name) is None else values[name]
        return None if value == off else value

    settings = {
        "temperature": take("temperature", 1.0) if values.get("do_sample") else 0.0, "top_k": take("top_k", 50, off=0),
        "top_p": take("top_p", off=1), "min_p": take("min_p", off=0),
        "repetition_penalty": take("repetition_penalty", off=1), "eos": _ids(values.get("eos_token_id"), tokenizer),
        "first": take("forced_bos_token_id"), "last": take("forced_eos_token_id"), "max_length": take("max_length"),
    }
    new = take("max_new_tokens")
    return settings if new is None else settings | {"max_new_tokens": new}


def _written(folder, ignore) -> dict:
    """What a folder says about generation: generation_config.json, or config.json where there is none; the tokens that
    the first leaves open are those of the second."""
    config = read_json(folder, CONFIG)
    config = (config.get("text_config") or {}) | {name: value for name, value in config.items() if value is not None}
    values = read_json(folder, SETTINGS) or config
    if values.get("eos_token_id") is None:
        values = values | {"eos_token_id": config.get("eos_token_id")}
    return {name: value for name, value in values.items() if name not in ignore}


def _ids(tokens: int | str | list | None, tokenizer: CheckpointTokenizer) -> list[int]:
    """Ids of tokens written as one or as a list, by number or by name; the tokenizer's EOS where none is."""
    if tokens is None:
        return [] if tokenizer.eos is None else [tokenizer.eos]
    ids = [tokenizer.id_of(token) if isinstance(token, str) else token for token in
           (tokens if isinstance(tokens, list) else [tokens])]
    if None in ids:
        raise ValueError(f"eos_token_id = {tokens!r} names a token that the tokenizer does not have")
    return ids
