"""The Universal Transformer: one block recurring in depth, with halting per token (arXiv:1807.03819).

The block is that of our Transformer (pre-norm, rotary, SwiGLU), so that the two differ in their depth alone. Weights
are used once a step: at equal parameters it is wider and costs more operations.

The sparse one (Tan et al. 2023, arXiv:2310.07096) has experts for its MLP: more weights at the same work. Its attention
is dense here and its halting is that of the dense one.
"""

from archlab.attention.attention import Attention
from archlab.depth.coordinates import Coordinates
from archlab.depth.halting import ACT
from archlab.depth.recur import Recur
from archlab.experts.moe import MoE
from archlab.layers.mlp import SwiGLU
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def universal_transformer(width: int, steps: int, heads: int, hidden: int, vocab: int = 256,
                          **attention) -> LanguageModel:
    """At most `steps` steps of one block; `attention` takes the fields of `Attention`."""
    block = Sequence(Residual(Attention(heads, **attention)), Residual(SwiGLU(hidden)))
    return LanguageModel(vocab, width, Recur(block, steps, Coordinates(), ACT()))


def sparse_universal_transformer(width: int, steps: int, heads: int, experts: int, hidden: int, vocab: int = 256,
                                 **attention) -> LanguageModel:
    """The same with `experts` experts of `hidden` channels, two for each token and step."""
    block = Sequence(Residual(Attention(heads, **attention)), Residual(MoE(experts, hidden)))
    return LanguageModel(vocab, width, Recur(block, steps, Coordinates(), ACT()))


CONFIGS = {
    "universal-transformer-nano": universal_transformer(width=48, steps=3, heads=4, hidden=128),
    "universal-transformer-tiny": universal_transformer(width=256, steps=4, heads=4, hidden=1024),
    "universal-transformer-small": universal_transformer(width=768, steps=4, heads=12, hidden=3072, vocab=512),
    "sparse-universal-transformer-nano": sparse_universal_transformer(width=32, steps=3, heads=4, experts=4, hidden=48),
    "sparse-universal-transformer-tiny": sparse_universal_transformer(width=192, steps=4, heads=4, experts=8,
                                                                      hidden=256),
    "sparse-universal-transformer-small": sparse_universal_transformer(width=512, steps=4, heads=8, experts=8,
                                                                       hidden=704, vocab=512),
}
