"""Longformer, causal: a sliding window, and each document's first tokens (arXiv:2004.05150)."""

from archlab.attention.sparse import Longformer
from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def longformer(width: int, depth: int, heads: int, hidden: int, vocab: int = 256, **attention) -> LanguageModel:
    """`depth` blocks of sparse attention and MLP; `attention` takes the fields of `Longformer`."""
    block = Sequence(Residual(Longformer(heads, **attention)), Residual(SwiGLU(hidden)))
    return LanguageModel(vocab, width, Repeat(block, depth))


CONFIGS = {
    "longformer-nano": longformer(width=32, depth=2, heads=4, hidden=64, kv_heads=2, window=5, globals=2),
    "longformer-tiny": longformer(width=128, depth=6, heads=4, hidden=344, window=64, globals=4),
    "longformer-small": longformer(width=256, depth=6, heads=8, hidden=688, window=256, globals=16, vocab=512),
}
