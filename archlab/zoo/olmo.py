"""OLMo: norms without parameters and a bound on queries, keys and values (1: arXiv:2402.00838); later norms after each
branch, and of all queries and keys together (2: arXiv:2501.00656). OLMoE has eight of 64 experts for its MLP, whose
weights are left as they are (arXiv:2409.02060)."""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.attention.qk_norm import QKNorm
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import LayerNorm, RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def olmo1(width, depth, heads, hidden, vocab=50304, clip=None, tied=False) -> LanguageModel:
    norm = LayerNorm(gain=False, bias=False)
    block = Sequence(Residual(Attention(heads, clip=clip), norm), Residual(SwiGLU(hidden), norm))
    return LanguageModel(vocab, width, Repeat(block, depth), norm, tied)


def olmo2(width, depth, heads, hidden, kv_heads=None, vocab=100352, tied=False) -> LanguageModel:
    attend = Attention(heads, kv_heads, positions=Rotary(500000.0), qk_norm=QKNorm(RMSNorm(), over="all"))
    branch = lambda layer: Residual(layer, before=None, after=RMSNorm())
    return LanguageModel(vocab, width, Repeat(Sequence(branch(attend), branch(SwiGLU(hidden))), depth), RMSNorm(), tied)


def olmoe(width, depth, heads, experts, k, hidden, vocab=50304) -> LanguageModel:
    norm = RMSNorm(1e-5)
    attend = Attention(heads, qk_norm=QKNorm(norm, over="all"))
    block = Sequence(Residual(attend, norm), Residual(MoE(experts, hidden, TopK(k)), norm))
    return LanguageModel(vocab, width, Repeat(block, depth), norm, tied=False)


CONFIGS = {
    "olmo-nano": olmo1(32, 2, 4, 64, vocab=256, clip=0.5, tied=True),
    "olmo-tiny": olmo1(128, 6, 4, 344, vocab=256, tied=True),
    "olmo2-nano": olmo2(32, 2, 4, 64, vocab=256, tied=True),
    "olmo2-tiny": olmo2(128, 6, 4, 344, vocab=256, tied=True),
    "olmo-1b": olmo1(2048, 16, 16, 8192, tied=True),
    "olmo-7b": olmo1(4096, 32, 32, 11008),
    "olmo2-1b": olmo2(2048, 16, 16, 8192),
    "olmo2-7b": olmo2(4096, 32, 32, 11008),
    "olmo2-13b": olmo2(5120, 40, 40, 13824),
    "olmo2-32b": olmo2(5120, 64, 40, 27648, kv_heads=8),
    "olmoe-1b-7b": olmoe(2048, 16, 16, 64, 8, 1024),
}
