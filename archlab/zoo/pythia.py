"""Pythia (GPT-NeoX's form): attention and MLP side by side on one input, a quarter of each head turned.

Biderman et al. 2023 (arXiv:2304.01373); Black et al. 2022 (arXiv:2204.06745). Each branch has a norm of its own; GPT-J
and Phi share one between the two, `Residual(Parallel(attention, mlp), norm)`.
"""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm, Normalise
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Parallel, Sequence
from archlab.model import LanguageModel


def pythia(width, depth, heads, vocab=50304, tied=False) -> LanguageModel:
    attend = Attention(heads, positions=Rotary(size=width // heads // 4), bias=True, out_bias=True)
    normed = lambda layer: Sequence(Normalise(LayerNorm()), layer)
    block = Residual(Parallel(normed(attend), normed(MLP(4 * width, "gelu", bias=True))), before=None)
    return LanguageModel(vocab, width, Repeat(block, depth), LayerNorm(), tied)


CONFIGS = {
    "pythia-nano": pythia(32, 2, 2, vocab=256, tied=True),
    "pythia-tiny": pythia(128, 6, 4, vocab=256, tied=True),
    "pythia-70m": pythia(512, 6, 8),
    "pythia-160m": pythia(768, 12, 12),
    "pythia-410m": pythia(1024, 24, 16),
    "pythia-1b": pythia(2048, 16, 8),
    "pythia-1.4b": pythia(2048, 24, 16),
    "pythia-2.8b": pythia(2560, 32, 32),
    "pythia-6.9b": pythia(4096, 32, 32, vocab=50432),
    "pythia-12b": pythia(5120, 36, 40, vocab=50688),
}
