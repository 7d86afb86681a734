"""A looped transformer: a prelude, a core that loops over what it made and sees its input again each time, a coda.

Huginn: Geiping et al. 2025 (arXiv:2502.05171), section 3, with a fixed number of loops that start from the prelude's
output instead of noise. Blocks are those of our Transformer.
"""

from archlab.attention.attention import Attention
from archlab.depth.inject import Inject
from archlab.depth.recur import Recur
from archlab.layers.mlp import SwiGLU
from archlab.layers.residual import Residual
from archlab.layers.sequence import Provide, Sequence
from archlab.model import LanguageModel


def looped(width: int, loops: int, heads: int, hidden: int, blocks: int = 1, vocab: int = 256,
           **attention) -> LanguageModel:
    """`blocks` blocks in the core, looped `loops` times; `attention` takes the fields of `Attention`."""
    block = Sequence(Residual(Attention(heads, **attention)), Residual(SwiGLU(hidden)))
    core = Sequence(Inject("input", "concat"), *[block] * blocks)
    return LanguageModel(vocab, width, Sequence(Provide("input", block), Recur(core, loops), block))


CONFIGS = {
    "looped-nano": looped(width=32, loops=3, heads=4, hidden=64, kv_heads=2),
    "looped-tiny": looped(width=160, loops=4, heads=5, hidden=432, blocks=2),
    "looped-small": looped(width=448, loops=4, heads=7, hidden=1200, blocks=2, vocab=512),
}
