"""HGRN2: gated linear recurrence with expanded states, and a gated MLP (arXiv:2404.07904).

Heads of 128 channels. Published sizes as in the authors' configs.
"""

from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.hgrn2 import HGRN2, LowerBounds


def hgrn2(width: int, depth: int, heads: int, hidden: int, vocab: int = 32000, tied: bool = False) -> LanguageModel:
    """The lower bounds of all layers, then `depth` blocks."""
    block = Sequence(Residual(HGRN2(heads)), Residual(SwiGLU(hidden)))
    return LanguageModel(vocab, width, Sequence(LowerBounds(), Repeat(block, depth)), tied=tied)


CONFIGS = {
    "hgrn2-nano": hgrn2(24, 2, 3, 32, vocab=256, tied=True),
    "hgrn2-tiny": hgrn2(128, 6, 2, 352, vocab=256, tied=True),
    "hgrn2-small": hgrn2(320, 8, 5, 864, vocab=512, tied=True),
    "hgrn2-1.3b": hgrn2(2048, 24, 16, 5632),
    "hgrn2-2.7b": hgrn2(2560, 32, 20, 6912),
}
