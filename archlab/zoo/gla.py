"""GLA: gated linear attention and a gated MLP (arXiv:2312.06635). Published sizes as in the authors' configs."""

from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.gla import GatedLinearAttention


def gla(width: int, depth: int, heads: int, hidden: int, vocab: int = 32000, tied: bool = False,
        **fields) -> LanguageModel:
    """`depth` blocks; `fields` are those of `GatedLinearAttention`."""
    block = Sequence(Residual(GatedLinearAttention(heads, **fields)), Residual(SwiGLU(hidden)))
    return LanguageModel(vocab, width, Repeat(block, depth), tied=tied)


CONFIGS = {
    "gla-nano": gla(24, 2, 3, 32, vocab=256, tied=True, rank=4),
    "gla-tiny": gla(128, 6, 2, 352, vocab=256, tied=True),
    "gla-small": gla(320, 8, 4, 864, vocab=512, tied=True),
    "gla-340m": gla(1024, 24, 4, 2816),
    "gla-1.3b": gla(2048, 24, 4, 5632),
}
