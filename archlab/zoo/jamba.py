"""Jamba: Mamba, attention and experts in one repeated unit (arXiv:2403.19887).

Of eight mixers the fifth is attention and the others are Mamba layers, with norms on dt, B and C; of the eight
feed-forward layers every second is a mixture of experts, whose weights are not scaled to sum to 1. No positions: Mamba
knows the order. Published: 16 experts, two a token, as wide as the dense layers, balance loss 0.001.
"""

from archlab.attention.attention import Attention
from archlab.experts.balance import SwitchLoss
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.mamba import Mamba

PATTERN = "MF ME MF ME AF ME MF ME"


def jamba(width: int, units: int, heads: int, hidden: int, experts: int = 16, kv_heads: int | None = None,
          state: int = 16, pattern: str = PATTERN, vocab: int = 256) -> LanguageModel:
    """`units` times the pattern: M a Mamba layer, A attention, F an MLP of `hidden` channels, E experts of as many."""
    layers = {
        "M": Residual(Mamba(state, inner_norm=RMSNorm())),
        "A": Residual(Attention(heads, kv_heads, positions=None)),
        "F": Residual(SwiGLU(hidden)),
        "E": Residual(MoE(experts, hidden, TopK(2), balance=(SwitchLoss(0.001),))),
    }
    unit = Sequence(*(layers[letter] for letter in pattern.replace(" ", "")))
    return LanguageModel(vocab, width, Repeat(unit, units))


CONFIGS = {
    "jamba-nano": jamba(width=24, units=1, heads=4, hidden=8, experts=8, state=8, pattern="MF ME AF ME"),
    "jamba-tiny": jamba(width=128, units=1, heads=4, hidden=128, experts=4),
    "jamba-small": jamba(width=256, units=1, heads=8, hidden=256, experts=8, kv_heads=4, vocab=512),
}
