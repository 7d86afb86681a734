"""Text from checkpoint folders: the same as transformers writes, with the settings of the folder or of the call."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import archlab
from archlab.hub import load_text

ROOT = Path(__file__).parent.parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
PROMPTS = ["w9 w11 w13", "w20", "w7 </s> w8 w41 w42"]
DRAWS = {"do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 1.0, "min_p": 0.05, "repetition_penalty": 1.2}


def with_tokenizer(name: str, folder: Path, generation: dict | None = None, config: dict | None = None) -> Path:
    """A fixture with a tokenizer of 64 words, its post-processor beginning (T5: ending) every text."""
    words = ["<pad>", "<s>", "</s>", "w3", "w4", "<turn>", *(f"w{i}" for i in range(6, 61)), "<call>", "w62", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece("##", cleanup=False)  # puts the spaces back
    template = "$A </s>" if name.startswith(("t5", "bart")) else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(template, f"{template} $B", [("<s>", 1), ("</s>", 2)])
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<turn>", "<call>"])
    for file in (FIXTURES / name).glob("model*.safetensors*"):
        (folder / file.name).symlink_to(file)
    values = json.loads((FIXTURES / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | (config or {})))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "TokenizersBackend"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def texts_of_transformers(folder) -> list[str]:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    ids = kind.from_pretrained(folder).generate(**inputs, use_cache=False)  # whose length is that of T5's encoder
    ids = ids if config.is_encoder_decoder else ids[:, inputs["input_ids"].shape[1]:]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name, generation", [
    ("llama", {"eos_token_id": 2, "max_new_tokens": 12}),
    ("llama", {"max_length": 24, "repetition_penalty": 1.7, "eos_token_id": [5, 61], "pad_token_id": 0}),
    ("t5", {"eos_token_id": 1, "decoder_start_token_id": 0, "max_new_tokens": 12, "repetition_penalty": 1.3,
            "forced_bos_token_id": 9, "forced_eos_token_id": 1, "pad_token_id": 0}),
])
def test_greedy_texts_are_those_of_transformers(name, generation, tmp_path):
    folder = with_tokenizer(name, tmp_path, generation)
    theirs = texts_of_transformers(folder)
    ours = load_text(folder).generate(PROMPTS)
    assert [text.strip() for text in ours] == [text.strip() for text in theirs] and any(theirs)


def test_what_a_folder_says(tmp_path):
    text = load_text(with_tokenizer("llama", tmp_path, DRAWS))
    assert text.settings == {"temperature": 0.9, "top_k": None, "top_p": None, "min_p": 0.05, "repetition_penalty": 1.2,
                             "eos": [2], "last": None} and text.max_length is None  # the EOS is that of config.json
    assert text.generate(PROMPTS, rngs=nnx.Rngs(1)) == text.generate(PROMPTS, rngs=nnx.Rngs(1))
    ids = text.tokenizer.encode(PROMPTS[0])
    drawn = archlab.generate(text.model, ids[None], 64, rngs=nnx.Rngs(3), **text.settings)[0, len(ids):]
    drawn = drawn[:next((i for i, index in enumerate(drawn) if index == 2), 64)]
    assert text.generate(PROMPTS[0], rngs=nnx.Rngs(3)) == [text.tokenizer.decode(drawn, after=ids)]


def test_without_a_file_of_settings_they_are_those_of_config(tmp_path):
    config = {"eos_token_id": [2, 50256], "do_sample": True, "top_p": 0.5}
    text = load_text(with_tokenizer("llama", tmp_path, config=config))
    assert text.settings["eos"] == [2]  # what is not of the vocabulary is never said
    assert (text.settings["temperature"], text.settings["top_k"], text.settings["top_p"]) == (1.0, 50, 0.5)


@pytest.mark.parametrize("eos, expected", [(None, [2]), ("w6", [6]), (["w6", 9], [6, 9]), (7, [7])])
def test_eos_by_number_by_name_or_of_the_tokenizer(eos, expected, tmp_path):
    text = load_text(with_tokenizer("llama", tmp_path, {"eos_token_id": eos}, {"eos_token_id": None}))
    assert text.settings["eos"] == expected


def test_settings_that_are_not_supported_are_all_named(tmp_path):
    generation = {"num_beams": 4, "no_repeat_ngram_size": 3, "typical_p": 1.0, "top_k": None}
    folder = with_tokenizer("llama", tmp_path, generation)
    with pytest.raises(ValueError, match="num_beams = 4, no_repeat_ngram_size = 3; .*ignore"):
        load_text(folder)
    text = load_text(folder, ignore=["num_beams", "no_repeat_ngram_size"])
    assert text.settings["temperature"] == 0 and text.settings["top_k"] == 50


@pytest.mark.parametrize("generation, message", [
    ({"eos_token_id": "<end>"}, "'<end>' names a token"), ({"forced_bos_token_id": 3}, "forced_bos_token_id")])
def test_what_makes_no_sense_is_named(generation, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_text(with_tokenizer("llama", tmp_path, generation))


def test_another_start_than_the_models_is_refused(tmp_path):
    with pytest.raises(ValueError, match="decoder_start_token_id = 5"):
        load_text(with_tokenizer("t5", tmp_path, {"decoder_start_token_id": 5}))


def test_a_folder_without_a_tokenizer_has_no_text():
    with pytest.raises(ValueError, match="no tokenizer.json"):
        load_text(FIXTURES / "llama")


def test_texts_from_the_command_line(tmp_path):
    """Several prompts, the folder's settings, a flag that overrides one."""
    folder = with_tokenizer("llama", tmp_path, {"max_new_tokens": 5, "repetition_penalty": 1.5, "do_sample": True})
    command = [sys.executable, "-m", "experiments.generate", f"--checkpoint={folder}", "--temperature=0"]
    done = subprocess.run([*command, *(f"--prompt={prompt}" for prompt in PROMPTS)], text=True, capture_output=True,
                          cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=300)
    assert done.returncode == 0, done.stderr
    texts = load_text(folder).generate(PROMPTS, temperature=0)
    assert done.stdout == "".join(f"{prompt}{text}\n" for prompt, text in zip(PROMPTS, texts))
