"""Mistral: Llama's block with a sliding window, so that the cache is a ring (Jiang et al. 2023, arXiv:2310.06825); and
Mixtral, without the window, but with two of eight experts for the MLP (arXiv:2401.04088)."""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.experts.balance import SwitchLoss
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
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


def mixtral(width, depth, heads, kv_heads, hidden, vocab) -> LanguageModel:
    norm, experts = RMSNorm(1e-5), MoE(8, hidden, TopK(2, renormalise=True), balance=(SwitchLoss(0.002),))
    attend = Attention(heads, kv_heads, positions=Rotary(1e6))
    return LanguageModel(vocab, width, Repeat(Sequence(Residual(attend, norm), Residual(experts, norm)), depth), norm,
                         tied=False)


CONFIGS = {
    "mistral-nano": mistral(32, 2, 4, 2, 64, vocab=256, window=6, tied=True),
    "mistral-tiny": mistral(128, 6, 4, 2, 344, vocab=256, window=128, tied=True),
    "mistral-7b": mistral(4096, 32, 32, 8, 14336),
    "mixtral-8x7b": mixtral(4096, 32, 32, 8, 14336, vocab=32000),
    "mixtral-8x22b": mixtral(6144, 56, 48, 8, 16384, vocab=32768),
}
