"""BigBird, causal: blocks of tokens see global, near and random blocks (arXiv:2007.14062)."""

from archlab.attention.sparse import BigBird
from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def bigbird(width: int, depth: int, heads: int, hidden: int, vocab: int = 256, **attention) -> LanguageModel:
    """`depth` blocks of sparse attention and MLP; `attention` takes the fields of `BigBird`."""
    block = Sequence(Residual(BigBird(heads, **attention)), Residual(SwiGLU(hidden)))
    return LanguageModel(vocab, width, Repeat(block, depth))


CONFIGS = {
    "bigbird-nano": bigbird(width=32, depth=2, heads=4, hidden=64, kv_heads=2, block=2, window=2, globals=1, random=2),
    "bigbird-tiny": bigbird(width=128, depth=6, heads=4, hidden=344, block=16),
    "bigbird-small": bigbird(width=256, depth=6, heads=8, hidden=688, vocab=512),
}
