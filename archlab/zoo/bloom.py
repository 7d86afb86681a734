"""BLOOM: no positions in the stream, but scores that fall with distance (ALiBi), and a norm of the embedded text.

Le Scao et al. 2022 (arXiv:2211.05100).
"""

from archlab.attention.attention import Attention
from archlab.attention.positions import ALiBi
from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm, Normalise
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def bloom(width, depth, heads, vocab=250880) -> LanguageModel:
    norm = LayerNorm()
    block = Sequence(Residual(Attention(heads, positions=ALiBi(), bias=True, out_bias=True), norm),
                     Residual(MLP(4 * width, "gelu_tanh", bias=True), norm))
    return LanguageModel(vocab, width, Sequence(Normalise(norm), Repeat(block, depth)), norm)


CONFIGS = {
    "bloom-nano": bloom(24, 2, 3, vocab=256),
    "bloom-tiny": bloom(128, 6, 4, vocab=256),
    "bloom-560m": bloom(1024, 24, 16),
    "bloom-1b1": bloom(1536, 24, 16),
    "bloom-1b7": bloom(2048, 24, 16),
    "bloom-3b": bloom(2560, 30, 32),
    "bloom-7b1": bloom(4096, 30, 32),
    "bloom-176b": bloom(14336, 70, 112),
}
