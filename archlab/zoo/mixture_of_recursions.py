"""Mixture-of-Recursions with middle-cycle sharing: the first and last block stand alone, what is between recurs
(arXiv:2507.10524). Blocks are those of our Transformer."""

from archlab.attention.attention import Attention
from archlab.depth.depth_choice import DepthChoice
from archlab.depth.mixture_of_recursions import MixtureOfRecursions
from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def mixture_of_recursions(width: int, heads: int, hidden: int, vocab: int = 256, recursions: int = 3, blocks: int = 2,
                          attention: dict = {}, **routing) -> LanguageModel:
    """A block, `blocks` that recur, a block. attention: fields of `Attention`; routing: of `MixtureOfRecursions`."""
    block = Sequence(Residual(Attention(heads, **attention)), Residual(SwiGLU(hidden)))
    unit = Sequence(block, block) if blocks == 2 else Repeat(block, blocks)
    return LanguageModel(vocab, width, Sequence(block, MixtureOfRecursions(unit, recursions, **routing), block))


def published(recursions: int, blocks: int) -> LanguageModel:
    """The 360M models of the paper: the shape of SmolLM-360M, 32 blocks deep (table 3)."""
    return mixture_of_recursions(width=960, heads=15, hidden=2560, vocab=49152, recursions=recursions, blocks=blocks,
                                 attention=dict(kv_heads=5))


TOKEN_CHOICE = dict(router=DepthChoice(), cache="shared")

CONFIGS = {
    "mixture-of-recursions-nano": mixture_of_recursions(width=32, heads=4, hidden=64, attention=dict(kv_heads=2)),
    "mixture-of-recursions-tiny": mixture_of_recursions(width=160, heads=5, hidden=432),
    "mixture-of-recursions-small": mixture_of_recursions(width=448, heads=7, hidden=1200, vocab=512),
    "token-choice-recursions-nano": mixture_of_recursions(width=32, heads=4, hidden=64, attention=dict(kv_heads=2),
                                                          **TOKEN_CHOICE),
    "token-choice-recursions-tiny": mixture_of_recursions(width=160, heads=5, hidden=432, **TOKEN_CHOICE),
    "token-choice-recursions-small": mixture_of_recursions(width=448, heads=7, hidden=1200, vocab=512, **TOKEN_CHOICE),
    "mixture-of-recursions-360m-2": published(recursions=2, blocks=15),
    "mixture-of-recursions-360m-3": published(recursions=3, blocks=10),
}
