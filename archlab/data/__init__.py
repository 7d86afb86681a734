"""Text in, batches out: corpora of documents, tokenizers, and packed, sharded, resumable batches."""

from archlab.data.batches import Batch, pack, train_batches, validation_batches
from archlab.data.corpora import Corpus, load_corpus
from archlab.data.tokenizers import BpeTokenizer, ByteTokenizer, tokenizer_from

__all__ = [
    "Batch",
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "load_corpus",
    "pack",
    "tokenizer_from",
    "train_batches",
    "validation_batches",
]
