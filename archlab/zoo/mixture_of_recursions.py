"""Mixture-of-Recursions with middle-cycle sharing: the first and last block stand alone, what is between recurs
(arXiv:2507.10524). Blocks are those of our Transformer."""

from archlab.attention.attention import Attention
from archlab.depth.mixture_of_recursions import MixtureOfRecursions
from archlab.layers.mlp import SwiGLU
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def mixture_of_recursions(width: int, heads: int, hidden: int, vocab: int = 256, recursions: int = 3,
                          **attention) -> LanguageModel:
    """A block, two blocks that recur, a block; `attention` takes the fields of `Attention`."""
    block = Sequence(Residual(Attention(heads, **attention)), Residual(SwiGLU(hidden)))
    middle = MixtureOfRecursions(Sequence(block, block), recursions)
    return LanguageModel(vocab, width, Sequence(block, middle, block))


CONFIGS = {
    "mixture-of-recursions-nano": mixture_of_recursions(width=32, heads=4, hidden=64, kv_heads=2),
    "mixture-of-recursions-tiny": mixture_of_recursions(width=160, heads=5, hidden=432),
    "mixture-of-recursions-small": mixture_of_recursions(width=448, heads=7, hidden=1200, vocab=512),
}
