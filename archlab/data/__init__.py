"""Text in, batches out: corpora of documents, tokenizers, and packed, sharded, resumable batches.

Synthetic tasks, which stand where a corpus does, are in `archlab.data.tasks`.
"""

from archlab.data.batches import Batch, pack, train_batches, validation_batches
from archlab.data.corpora import Corpus, load_corpus
from archlab.data.tokenizers import BpeTokenizer, ByteTokenizer, Symbols, tokenizer_from

__all__ = [
    "Batch",
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "Symbols",
    "load_corpus",
    "pack",
    "tokenizer_from",
    "train_batches",
    "validation_batches",
]
