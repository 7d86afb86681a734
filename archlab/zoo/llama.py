"""Llama, at its published sizes: the block of our Transformer, with grouped queries and ever larger vocabularies.

Llama 2 (arXiv:2307.09288), Llama 3.1 (arXiv:2407.21783) with its rotary scaling, and SmolLM, of the same form.
"""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.attention.scaling import Llama3Scaling
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel

LLAMA2 = Rotary()
LLAMA3 = Rotary(500000.0, scaling=Llama3Scaling(factor=8.0, low=1.0, high=4.0, original=8192))
LLAMA3_SMALL = LLAMA3.set("scaling.factor", 32.0)  # 3.2, 1B and 3B


def llama(width, depth, heads, kv_heads, hidden, vocab=128256, positions=LLAMA3, tied=False, eps=1e-5) -> LanguageModel:
    norm = RMSNorm(eps)
    block = Sequence(Residual(Attention(heads, kv_heads, positions=positions), norm), Residual(SwiGLU(hidden), norm))
    return LanguageModel(vocab, width, Repeat(block, depth), norm, tied)


CONFIGS = {
    "llama-nano": llama(32, 2, 4, 2, 64, vocab=256, positions=LLAMA3.set("scaling.original", 16), tied=True),
    "llama-tiny": llama(128, 6, 4, 2, 344, vocab=256, tied=True),
    "llama-2-7b": llama(4096, 32, 32, 32, 11008, 32000, LLAMA2),
    "llama-2-13b": llama(5120, 40, 40, 40, 13824, 32000, LLAMA2),
    "llama-2-70b": llama(8192, 80, 64, 8, 28672, 32000, LLAMA2),
    "llama-3.2-1b": llama(2048, 16, 32, 8, 8192, positions=LLAMA3_SMALL, tied=True),
    "llama-3.2-3b": llama(3072, 28, 24, 8, 8192, positions=LLAMA3_SMALL, tied=True),
    "llama-3.1-8b": llama(4096, 32, 32, 8, 14336),
    "llama-3.1-70b": llama(8192, 80, 64, 8, 28672),
    "llama-3.1-405b": llama(16384, 126, 128, 8, 53248),
    "smollm-135m": llama(576, 30, 9, 3, 1536, 49152, LLAMA2, tied=True),
    "smollm-360m": llama(960, 32, 15, 5, 2560, 49152, LLAMA2, tied=True),
    "smollm-1.7b": llama(2048, 24, 32, 32, 8192, 49152, LLAMA2, tied=True),
}
