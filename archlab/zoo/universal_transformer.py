"""The Universal Transformer: one block recurring in depth, with halting per token (arXiv:1807.03819).

The block is that of our Transformer (pre-norm, rotary, SwiGLU), so that the two differ in their depth alone. Weights
are used once a step: at equal parameters it is wider and costs more operations.
"""

from archlab.attention.attention import Attention
from archlab.depth.coordinates import Coordinates
from archlab.depth.halting import ACT
from archlab.depth.recur import Recur
from archlab.layers.mlp import SwiGLU
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def universal_transformer(width: int, steps: int, heads: int, hidden: int, vocab: int = 256,
                          **attention) -> LanguageModel:
    """At most `steps` steps of one block; `attention` takes the fields of `Attention`."""
    block = Sequence(Residual(Attention(heads, **attention)), Residual(SwiGLU(hidden)))
    return LanguageModel(vocab, width, Recur(block, steps, Coordinates(), ACT()))


CONFIGS = {
    "universal-transformer-nano": universal_transformer(width=48, steps=3, heads=4, hidden=128),
    "universal-transformer-tiny": universal_transformer(width=256, steps=4, heads=4, hidden=1024),
    "universal-transformer-small": universal_transformer(width=768, steps=4, heads=12, hidden=3072, vocab=512),
}
