"""GLaM: every other layer of a decoder has 64 experts, of which a token goes to two (Du et al. 2021, arXiv:2112.06905).

The dense layers between have gated MLPs, the experts plain ones; the second expert is taken by chance, as in GShard. A
bias by distance in every layer (T5's stands for Transformer-XL's). The smaller ones match their published sizes with
32,000 tokens, the largest with 256,000.
"""

from archlab.attention.attention import Attention
from archlab.attention.positions import RelativePositions
from archlab.attention.relative import RelativeBias
from archlab.experts.balance import SwitchLoss
from archlab.experts.capacity import Capacity
from archlab.experts.gshard import SecondByChance
from archlab.experts.moe import MoE
from archlab.layers.mlp import GeGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def glam(width, layers, heads, head_size, hidden, experts=64, vocab=32000) -> LanguageModel:
    attention = Attention(heads, head_size=head_size, positions=RelativePositions())
    attend = Sequence(RelativeBias(heads), Residual(attention))
    sparse = MoE(experts, hidden, SecondByChance(), Capacity(1.0, order="choice"), (SwitchLoss(first=1),), "gelu",
                 gated=False)
    pair = Sequence(attend, Residual(GeGLU(hidden)), attend, Residual(sparse))
    return LanguageModel(vocab, width, Repeat(pair, layers // 2))


CONFIGS = {
    "glam-nano": glam(24, 2, 2, 12, 32, experts=4, vocab=256),
    "glam-tiny": glam(128, 4, 4, 32, 256, experts=8, vocab=256),
    "glam-1.7b-64e": glam(2048, 24, 16, 128, 8192),
    "glam-8b-64e": glam(4096, 32, 32, 128, 16384),
    "glam-64b-64e": glam(8192, 64, 128, 128, 32768, vocab=256000),
}
