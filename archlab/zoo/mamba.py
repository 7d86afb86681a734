"""Mamba and Mamba-2: selective state-space layers and nothing else (arXiv:2312.00752, arXiv:2405.21060).

The published sizes use GPT-NeoX's tokens, their number rounded up to a multiple of 8, or of 16 for Mamba-2. Two layers
take the place of an attention layer and its MLP.
"""

from archlab.layers.config import LayerConfig
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.model import LanguageModel
from archlab.recurrence.mamba import Mamba
from archlab.recurrence.mamba2 import Mamba2


def mamba(width: int, depth: int, mixer: LayerConfig = Mamba(), vocab: int = 256, **fields) -> LanguageModel:
    """`depth` layers of `mixer`; `fields` are those of `LanguageModel`."""
    norm = RMSNorm(1e-5)
    return LanguageModel(vocab, width, Repeat(Residual(mixer, norm), depth), norm, **fields)


PUBLISHED = {"130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}

CONFIGS = {
    "mamba-nano": mamba(width=32, depth=2, mixer=Mamba(state=8)),
    "mamba-tiny": mamba(width=128, depth=10),
    "mamba-small": mamba(width=512, depth=6, vocab=512),
    **{f"mamba-{size}": mamba(width, depth, vocab=50_280) for size, (width, depth) in PUBLISHED.items()},
    "falcon-mamba-7b": mamba(4096, 64, Mamba(inner_norm=RMSNorm(gain=False)), vocab=65_024, tied=False),
    "mamba2-nano": mamba(width=32, depth=2, mixer=Mamba2(state=8, head_size=8, groups=2)),
    "mamba2-tiny": mamba(width=128, depth=10, mixer=Mamba2(state=32, head_size=32)),
    "mamba2-small": mamba(width=512, depth=6, mixer=Mamba2(state=64), vocab=512),
    **{f"mamba2-{size}": mamba(width, depth, Mamba2(), vocab=50_288)
       for size, (width, depth) in PUBLISHED.items() if size != "2.8b"},
    "mamba2-2.7b": mamba(2560, 64, Mamba2(), vocab=50_288),
}
