"""minGRU: the smallest recurrence that trains in parallel, and an MLP (arXiv:2410.01201).

The paper's language model also has a short convolution before each recurrence; it is left out for the sake of a layer
that fits on a page.
"""

from archlab.layers.mlp import MLP
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.min_gru import MinGRU


def min_gru(width: int, depth: int, expand: int = 2, vocab: int = 256) -> LanguageModel:
    """`depth` blocks of a minGRU with `expand * width` channels and an MLP with 4 times the width."""
    return LanguageModel(vocab, width, Repeat(Sequence(Residual(MinGRU(expand)), Residual(MLP(4 * width))), depth))


CONFIGS = {
    "mingru-nano": min_gru(width=24, depth=2),
    "mingru-tiny": min_gru(width=128, depth=5),
    "mingru-small": min_gru(width=384, depth=5, vocab=512),
}
