"""Gated DeltaNet: the gated delta rule and a gated MLP (arXiv:2412.06464).

Keys of all heads together are 3/4 as wide as the stream and values twice that, so that a layer has 6 D^2 weights, as
Mamba-2's has. Published sizes as in the authors' configs.
"""

from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.gated_delta_net import GatedDeltaNet


def gated_delta_net(width: int, depth: int, heads: int, hidden: int, vocab: int = 32000, tied: bool = False,
                    **fields) -> LanguageModel:
    """`depth` blocks; `fields` are those of `GatedDeltaNet`."""
    block = Sequence(Residual(GatedDeltaNet(heads, **fields)), Residual(SwiGLU(hidden)))
    return LanguageModel(vocab, width, Repeat(block, depth), tied=tied)


CONFIGS = {
    "gated-delta-net-nano": gated_delta_net(24, 2, 2, 32, vocab=256, tied=True, value_heads=4, key_size=6,
                                            value_size=8),
    "gated-delta-net-tiny": gated_delta_net(128, 6, 2, 352, vocab=256, tied=True, key_size=48, value_size=96),
    "gated-delta-net-small": gated_delta_net(320, 7, 3, 832, vocab=512, tied=True, key_size=80, value_size=160),
    "gated-delta-net-340m": gated_delta_net(1024, 21, 6, 2816, key_size=128, value_size=256),
    "gated-delta-net-1.3b": gated_delta_net(2048, 21, 6, 5632),
}
