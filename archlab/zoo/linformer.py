"""Linformer, causal: exact attention within a block, a low-rank summary of each earlier one (arXiv:2006.04768).

The published form, `attention.linformer.Linformer`, sees both ways, and so is for encoders.
"""

from archlab.attention.linformer import CausalLinformer
from archlab.layers.mlp import MLP
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def linformer(width: int, depth: int, heads: int, hidden: int, vocab: int = 256, **attention) -> LanguageModel:
    """`depth` blocks of low-rank attention and MLP; `attention` takes the fields of `CausalLinformer`."""
    block = Sequence(Residual(CausalLinformer(heads, **attention)), Residual(MLP(hidden)))
    return LanguageModel(vocab, width, Repeat(block, depth))


CONFIGS = {
    "linformer-nano": linformer(width=32, depth=2, heads=4, hidden=96, kv_heads=2, block=4, rank=2),
    "linformer-tiny": linformer(width=128, depth=6, heads=4, hidden=512, block=32, rank=4),
    "linformer-small": linformer(width=256, depth=6, heads=8, hidden=1024, vocab=512),
}
