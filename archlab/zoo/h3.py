"""H3: shift and diagonal state spaces between gates, with MLPs, and in the published sizes two attention layers
(arXiv:2212.14052)."""

from archlab.attention.attention import Attention
from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm
from archlab.layers.repeat import stack
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.h3 import H3


def h3(width: int, depth: int, attention: tuple[int, ...] = (), heads: int | None = None, vocab: int = 256,
       **fields) -> LanguageModel:
    """`depth` blocks of a mixer and an MLP. attention: the numbers of the blocks whose mixer is attention, of `heads`
    heads and without positions; the others are H3 with `fields`."""
    def block(index: int) -> Sequence:
        attends = index in attention
        mixer = Attention(heads, positions=None, bias=True, out_bias=True) if attends else H3(**fields)
        mlp = MLP(4 * width, "gelu_tanh", bias=True)
        return Sequence(Residual(mixer, LayerNorm()), Residual(mlp, LayerNorm()))

    return LanguageModel(vocab, width, stack([block(i) for i in range(depth)])[0], LayerNorm())


CONFIGS = {
    "h3-nano": h3(32, 2, state=8, head_dim=2),
    "h3-tiny": h3(128, 6, state=32),
    "h3-small": h3(384, 6, state=64, vocab=512),
    "h3-125m": h3(768, 12, (1, 8), 12, vocab=50264),
    "h3-355m": h3(1024, 24, (1, 13), 16, vocab=50264),
    "h3-1.3b": h3(2048, 24, (1, 13), 16, vocab=50264),
}
