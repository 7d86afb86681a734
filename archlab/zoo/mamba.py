"""Mamba: selective state-space layers and nothing else (arXiv:2312.00752)."""

from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.model import LanguageModel
from archlab.recurrence.mamba import Mamba


def mamba(width: int, depth: int, vocab: int = 256, **fields) -> LanguageModel:
    """`depth` Mamba layers; `fields` are those of `Mamba`."""
    return LanguageModel(vocab, width, Repeat(Residual(Mamba(**fields)), depth))


CONFIGS = {
    "mamba-nano": mamba(width=32, depth=2, state=8),
    "mamba-tiny": mamba(width=128, depth=10, state=16),
    "mamba-small": mamba(width=512, depth=6, state=16, vocab=512),
}
