"""S5: layers that share one diagonal state space among all channels (arXiv:2208.04933)."""

from archlab.layers.norms import LayerNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.model import LanguageModel
from archlab.recurrence.s5 import S5


def s5(width: int, depth: int, state: int, blocks: int, vocab: int = 256) -> LanguageModel:
    """`depth` layers, a norm before each."""
    return LanguageModel(vocab, width, Repeat(Residual(S5(state, blocks), LayerNorm()), depth), LayerNorm())


CONFIGS = {
    "s5-nano": s5(32, 2, state=16, blocks=2),
    "s5-tiny": s5(192, 10, state=192, blocks=8),
    "s5-small": s5(512, 12, state=512, blocks=8, vocab=512),
}
