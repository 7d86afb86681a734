"""Hyena: long implicit convolutions between gates, and MLPs (arXiv:2302.10866)."""

from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.hyena import Hyena


def hyena(width: int, depth: int, hidden: int, vocab: int = 256, **fields) -> LanguageModel:
    """`depth` blocks of Hyena with `fields` and an MLP, a norm before each."""
    mlp = MLP(hidden, "gelu_tanh", bias=True)
    block = Sequence(Residual(Hyena(**fields), LayerNorm()), Residual(mlp, LayerNorm()))
    return LanguageModel(vocab, width, Repeat(block, depth), LayerNorm())


CONFIGS = {
    "hyena-nano": hyena(32, 2, 32, length=256, order=3, filter_width=16, features=5, frequency=1.0),
    "hyena-tiny": hyena(128, 8, 256, length=1024, filter_width=32, features=5),
    "hyena-small": hyena(384, 8, 768, vocab=512, length=2048, features=9),
    # 50,257 tokens, filled up to a multiple of 8
    "hyena-153m": hyena(864, 18, 1728, vocab=50264),
    "hyena-355m": hyena(1024, 36, 2048, vocab=50264),
    "hyena-1.3b": hyena(2048, 36, 4096, vocab=50264),
}
