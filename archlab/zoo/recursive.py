"""A relaxed recursive transformer: all blocks but the first and the last recur, with norms and low-rank corrections
that each recursion owns.

Bae et al. 2024 (arXiv:2410.20672), section 2; the middle cycle is that of Mixture-of-Recursions (arXiv:2507.10524),
which without routing is this. Blocks are those of our Transformer.
"""

from archlab.attention.attention import Attention
from archlab.depth.own import LowRank, Own
from archlab.depth.sharing import cycle
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def recursive(width: int, layers: int, heads: int, hidden: int, rank: int, recursions: int = 3, vocab: int = 256,
              **attention) -> LanguageModel:
    """`layers` effective layers, of (layers - 2) / recursions + 2 blocks; `attention`: the fields of `Attention`."""
    mixer, mlp = Attention(heads, **attention), SwiGLU(hidden)
    block = Sequence(Residual(mixer), Residual(mlp))
    relaxed = Sequence(Residual(LowRank(mixer, rank), Own(RMSNorm())), Residual(LowRank(mlp, rank), Own(RMSNorm())))
    return LanguageModel(vocab, width, Sequence(block, cycle(relaxed, layers - 2, recursions), block))


CONFIGS = {
    "recursive-nano": recursive(width=32, layers=5, heads=4, hidden=64, rank=2, kv_heads=2),
    "recursive-tiny": recursive(width=160, layers=8, heads=5, hidden=432, rank=8),
    "recursive-small": recursive(width=448, layers=8, heads=7, hidden=1200, rank=16, vocab=512),
}
