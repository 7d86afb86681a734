"""Mamba-3 and a gated MLP, in turn (arXiv:2603.15569, section 4).

The published sizes: Llama 3's vocabulary, an MLP of 2D channels, and with four inputs and outputs a state (MIMO) one so
much narrower that the total stays the same (4096 to 3824). Depths are those for which the totals come out as named.
"""

from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.mamba3 import Mamba3


def mamba3(width: int, depth: int, hidden: int | None = None, vocab: int = 128256, **fields) -> LanguageModel:
    """`depth` blocks; hidden: of the MLP, None for 2D; `fields` are those of `Mamba3`."""
    block = Sequence(Residual(Mamba3(**fields)), Residual(SwiGLU(hidden or 2 * width)))
    return LanguageModel(vocab, width, Repeat(block, depth))


CONFIGS = {
    "mamba3-nano": mamba3(24, 2, vocab=256, state=8, head_size=12),
    "mamba3-tiny": mamba3(128, 6, vocab=256, state=32, head_size=32),
    "mamba3-small": mamba3(320, 8, vocab=512, state=64, head_size=64),
    "mamba3-mimo-nano": mamba3(24, 2, vocab=256, state=8, head_size=12, mimo_rank=2),
    "mamba3-mimo-tiny": mamba3(128, 6, vocab=256, state=32, head_size=32, mimo_rank=4),
    "mamba3-180m": mamba3(768, 12),
    "mamba3-440m": mamba3(1024, 24),
    "mamba3-880m": mamba3(1536, 24),
    "mamba3-1.5b": mamba3(2048, 24),
    "mamba3-mimo-1.5b": mamba3(2048, 24, hidden=3824, mimo_rank=4),
}
