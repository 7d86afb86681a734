"""Mistral: Llama's block with a sliding window, so that the cache is a ring (Jiang et al. 2023, arXiv:2310.06825)."""

from archlab.attention.attention import Attention
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def mistral(width, depth, heads, kv_heads, hidden, vocab=32000, window=4096, tied=False) -> LanguageModel:
    norm = RMSNorm(1e-5)
    block = Sequence(Residual(Attention(heads, kv_heads, window=window), norm), Residual(SwiGLU(hidden), norm))
    return LanguageModel(vocab, width, Repeat(block, depth), norm, tied)


CONFIGS = {
    "mistral-nano": mistral(32, 2, 4, 2, 64, vocab=256, window=6, tied=True),
    "mistral-tiny": mistral(128, 6, 4, 2, 344, vocab=256, window=128, tied=True),
    "mistral-7b": mistral(4096, 32, 32, 8, 14336),
}
