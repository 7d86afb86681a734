"""DeltaNet: the delta rule and a gated MLP (arXiv:2406.06484). Published sizes as in the authors' configs."""

from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.delta_net import DeltaNet


def delta_net(width: int, depth: int, heads: int, hidden: int, vocab: int = 32000, tied: bool = False,
              **fields) -> LanguageModel:
    """`depth` blocks; `fields` are those of `DeltaNet`."""
    block = Sequence(Residual(DeltaNet(heads, **fields)), Residual(SwiGLU(hidden)))
    return LanguageModel(vocab, width, Repeat(block, depth), tied=tied)


CONFIGS = {
    "delta-net-nano": delta_net(24, 2, 2, 32, vocab=256, tied=True, key_size=8, value_size=8, negative=True),
    "delta-net-tiny": delta_net(128, 6, 2, 352, vocab=256, tied=True, key_size=64, value_size=64),
    "delta-net-small": delta_net(320, 8, 5, 832, vocab=512, tied=True, key_size=64, value_size=64),
    "delta-net-340m": delta_net(1024, 24, 8, 2816),
    "delta-net-1.3b": delta_net(2048, 24, 16, 5632),
}
