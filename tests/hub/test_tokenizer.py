"""Tokenizers of checkpoints: the same ids and text as transformers; streams that break nothing; what is refused."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from archlab.hub.tokenizer import CheckpointTokenizer

WORDS = ["the quick brown fox jumps over the lazy dog", "naïve café, 日本語 🙂", "def f(x):\n\treturn x ** 2",
         "it isn't one."]
TEXTS = ["the fox", " leading and trailing ", "two  spaces\r\n\ttab", "unseen: Ωß 🙃 語語", "the </s> fox<s>dog",
         "日本語🙂🙂naïve", "", "the lazy-dog isn't 2.", "<|im_end|>the"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level():
    """GPT-2's and Llama 3's kind: byte-level BPE, here with a BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet,
                                                             special_tokens=["<s>", "</s>"], show_progress=False))
    return tokenizer


def llama():
    """Llama 2's kind: BPE over words with their spaces, unknown characters as bytes; the first space is stripped."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(WORDS[:1], trainers.BpeTrainer(vocab_size=80, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *learned["vocab"]])}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def unigram():
    """T5's kind: Unigram with Metaspace; it loses unknown characters and runs of spaces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(WORDS, trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    return tokenizer


def word_piece():
    """BERT's kind, in lower case."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(WORDS, trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False))
    return tokenizer


KINDS = {"byte level": byte_level, "llama": llama, "unigram": unigram, "word piece": word_piece}
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "add_eos_token": True,
          "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False}}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A folder whose file asks for BOS (T5's kind: EOS), and for truncation and padding, as training runs leave it."""
    tokenizer, folder = KINDS[request.param](), tmp_path_factory.mktemp("tokenizer")
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    template = "$A </s>" if request.param == "unigram" else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(template, f"{template} $B", ids)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8, pad_token="</s>")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return folder


def test_ids_and_text_are_those_of_transformers(folder):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours = CheckpointTokenizer.load(folder)
    assert (ours.bos, ours.eos, ours.vocab) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, special)
            assert ids.dtype == np.int32
            assert ids.tolist() == theirs(text, add_special_tokens=special, truncation=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_text_in_pieces_is_the_text(folder):
    tokenizer = CheckpointTokenizer.load(folder)
    for text in [*TEXTS, " ".join(TEXTS * 3)]:
        ids = tokenizer.encode(text).tolist()
        pieces = list(tokenizer.stream(iter(ids)))
        assert "".join(pieces) == tokenizer.decode(ids) and all(pieces)
        if "�" not in tokenizer.decode(ids):
            assert not any("�" in piece for piece in pieces)
        for cut in range(0, len(ids), 3):
            if "�" in tokenizer.decode(ids[:cut]):
                continue  # the cut goes through a character
            rest = tokenizer.decode(ids[cut:], after=ids[:cut])
            assert tokenizer.decode(ids[:cut]) + rest == tokenizer.decode(ids)
            assert "".join(tokenizer.stream(ids[cut:], after=ids[:cut])) == rest


def test_text_comes_as_soon_as_it_is_there():
    tokenizer = CheckpointTokenizer(llama(), {"eos_token": "</s>"})
    ids = tokenizer.encode("the 語 fox", special=False)
    read = []

    def reading():
        for index in ids:
            read.append(index)
            yield index

    for piece in tokenizer.stream(reading()):
        assert tokenizer.decode(read).endswith(piece) and "�" not in piece
    broken = [tokenizer.id_of("<0xFF>")] * 20
    assert "".join(tokenizer.stream(broken)) == "�" * 20 and len(list(tokenizer.stream(broken))) > 1


def test_spaces_between_prompt_and_text():
    tokenizer = CheckpointTokenizer(llama())
    prompt, fox = (tokenizer.encode(text) for text in ("the quick", "fox"))
    assert tokenizer.decode(fox) == "fox" and tokenizer.decode(fox, after=prompt) == " fox"
    assert "".join(tokenizer.stream(fox, after=prompt)) == " fox"


def test_named_tokens_are_special_where_the_vocabulary_has_them():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<end>": 1, "<unk>": 2, "<extra>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "<end>", "pad_token": "<pad>", "extra_special_tokens": ["<extra>"]}
    ours = CheckpointTokenizer(tokenizer, names)
    assert (ours.vocab, ours.bos, ours.eos, ours.id_of("<pad>")) == (4, None, 1, None)
    assert ours.encode("a<end><extra>a").tolist() == [0, 1, 3, 0] and ours.decode([0, 1, 3, 0]) == "a a"
    assert ours.decode([0, 77]) == "a"  # an id that only the model has


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json"):
        CheckpointTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer.json"):
        CheckpointTokenizer.load(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        CheckpointTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="-1"):
        CheckpointTokenizer(byte_level()).decode([-1])
