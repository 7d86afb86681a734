"""RetNet: retention and a plain MLP, of which retention takes twice as many weights (arXiv:2307.08621).

The published sizes are those of its table 2, with heads of 256 channels; the paper states no vocabulary, so they have
GPT-2's.
"""

from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.retention import Retention


def retnet(width: int, depth: int, heads: int, vocab: int = 50257, **retention) -> LanguageModel:
    """`depth` blocks of retention and an MLP of 2D channels; `retention` takes the fields of `Retention`."""
    block = Sequence(Residual(Retention(heads, **retention), LayerNorm()), Residual(MLP(2 * width), LayerNorm()))
    return LanguageModel(vocab, width, Repeat(block, depth), LayerNorm())


CONFIGS = {
    "retnet-nano": retnet(width=24, depth=2, heads=3, vocab=256),
    "retnet-tiny": retnet(width=128, depth=6, heads=2, vocab=256),
    "retnet-small": retnet(width=320, depth=8, heads=5, vocab=512),
    "retnet-1.3b": retnet(2048, 24, 8),
    "retnet-2.7b": retnet(2560, 32, 10),
    "retnet-6.7b": retnet(4096, 32, 16),
}
