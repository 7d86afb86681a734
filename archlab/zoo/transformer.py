"""The dense Transformer decoder: pre-norm, rotary, SwiGLU (Llama's block, arXiv:2302.13971)."""

from archlab.attention.attention import Attention
from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def transformer(width: int, depth: int, heads: int, hidden: int, vocab: int = 256, **attention) -> LanguageModel:
    """`depth` blocks of attention and MLP; `attention` takes the fields of `Attention`."""
    block = Sequence(Residual(Attention(heads, **attention)), Residual(SwiGLU(hidden)))
    return LanguageModel(vocab, width, Repeat(block, depth))


CONFIGS = {
    "transformer-nano": transformer(width=32, depth=2, heads=4, hidden=64, kv_heads=2),
    "transformer-tiny": transformer(width=128, depth=6, heads=4, hidden=344),
    "transformer-small": transformer(width=384, depth=6, heads=6, hidden=1024, vocab=512),
}
