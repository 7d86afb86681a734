"""Qwen: Llama's block with biases on queries, keys and values (2.5: arXiv:2412.15115), later with norms on each head's
queries and keys instead (3: arXiv:2505.09388)."""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.attention.qk_norm import QKNorm
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def qwen(width, depth, heads, kv_heads, hidden, vocab=151936, tied=False, **attention) -> LanguageModel:
    attend = Attention(heads, kv_heads, positions=Rotary(1e6), **attention)
    block = Sequence(Residual(attend), Residual(SwiGLU(hidden)))
    return LanguageModel(vocab, width, Repeat(block, depth), RMSNorm(), tied)


QWEN2 = dict(bias=True)
QWEN3 = dict(qk_norm=QKNorm(), head_size=128)

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
}
