"""Qwen: Llama's block with biases on queries, keys and values (2.5: arXiv:2412.15115), later with norms on each head's
queries and keys instead (3: arXiv:2505.09388). Both also with experts for the MLP: Qwen1.5-MoE beside a shared one that
each token gates, Qwen3's larger ones without."""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.attention.qk_norm import QKNorm
from archlab.experts.balance import SwitchLoss
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Gated, Parallel, Sequence
from archlab.model import LanguageModel


def qwen(width, depth, heads, kv_heads, hidden, vocab=151936, tied=False, **attention) -> LanguageModel:
    """hidden: the channels of the MLP; or the layer that stands in its place."""
    attend = Attention(heads, kv_heads, positions=Rotary(1e6), **attention)
    block = Sequence(Residual(attend), Residual(SwiGLU(hidden) if isinstance(hidden, int) else hidden))
    return LanguageModel(vocab, width, Repeat(block, depth), RMSNorm(), tied)


QWEN2 = dict(bias=True)
QWEN3 = dict(qk_norm=QKNorm(), head_size=128)
SHARED = Parallel(MoE(60, 1408, TopK(4), balance=(SwitchLoss(0.004),)), Gated(SwiGLU(5632)))


def of_128(hidden: int) -> MoE:
    return MoE(128, hidden, TopK(8, renormalise=True), balance=(SwitchLoss(0.008),))


CONFIGS = {
    "qwen3-nano": qwen(32, 2, 4, 2, 48, vocab=256, tied=True, qk_norm=QKNorm(), head_size=16),
    "qwen3-tiny": qwen(128, 6, 4, 2, 344, vocab=256, tied=True, qk_norm=QKNorm()),
    "qwen2.5-0.5b": qwen(896, 24, 14, 2, 4864, tied=True, **QWEN2),
    "qwen2.5-1.5b": qwen(1536, 28, 12, 2, 8960, tied=True, **QWEN2),
    "qwen2.5-7b": qwen(3584, 28, 28, 4, 18944, vocab=152064, **QWEN2),
    "qwen3-0.6b": qwen(1024, 28, 16, 8, 3072, tied=True, **QWEN3),
    "qwen3-1.7b": qwen(2048, 28, 16, 8, 6144, tied=True, **QWEN3),
    "qwen3-4b": qwen(2560, 36, 32, 8, 9728, tied=True, **QWEN3),
    "qwen3-8b": qwen(4096, 36, 32, 8, 12288, **QWEN3),
    "qwen3-14b": qwen(5120, 40, 40, 8, 17408, **QWEN3),
    "qwen3-32b": qwen(5120, 64, 64, 8, 25600, **QWEN3),
    "qwen1.5-moe-a2.7b": qwen(2048, 24, 16, 16, SHARED, **QWEN2),
    "qwen3-30b-a3b": qwen(2048, 48, 32, 4, of_128(768), **QWEN3),
    "qwen3-235b-a22b": qwen(4096, 94, 64, 4, of_128(1536), **QWEN3),
}
