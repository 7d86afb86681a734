"""GPT-2: learned positions, LayerNorm before each branch, GELU, biases everywhere (Radford et al. 2019)."""

from archlab.attention.attention import Attention
from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm
from archlab.layers.positions import LearnedPositions
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def gpt2(width: int, depth: int, heads: int, vocab: int = 50257, length: int = 1024) -> LanguageModel:
    norm = LayerNorm()
    block = Sequence(Residual(Attention(heads, positions=None, bias=True, out_bias=True), norm),
                     Residual(MLP(4 * width, "gelu_tanh", bias=True), norm))
    return LanguageModel(vocab, width, Sequence(LearnedPositions(length), Repeat(block, depth)), norm)


CONFIGS = {
    "gpt2-nano": gpt2(32, 2, 4, vocab=256, length=256),
    "gpt2-tiny": gpt2(128, 6, 4, vocab=256),
    "gpt2-124m": gpt2(768, 12, 12),
    "gpt2-medium": gpt2(1024, 24, 16),
    "gpt2-large": gpt2(1280, 36, 20),
    "gpt2-xl": gpt2(1600, 48, 25),
}
