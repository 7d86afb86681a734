"""Command R (Cohere): attention and MLP side by side on one norm without bias, pairs of neighbouring channels turned,
small logits. R7B (the second form): three layers with a window and rotary positions to one without either.

Known from their released code and configurations (2024).
"""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.attention.qk_norm import QKNorm
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import LayerNorm
from archlab.layers.repeat import stack
from archlab.layers.residual import Residual
from archlab.layers.sequence import Parallel
from archlab.model import LanguageModel

NORM = LayerNorm(bias=False)


def command(vocab, width, attentions, hidden, logit_scale) -> LanguageModel:
    """attentions: one for each layer."""
    blocks = [Residual(Parallel(attention, SwiGLU(hidden)), NORM) for attention in attentions]
    return LanguageModel(vocab, width, stack(blocks)[0], NORM, logit_scale=logit_scale)


def command_r(width, depth, heads, kv_heads, hidden, base=8e6, qk_norm=False, vocab=256000, logit_scale=0.0625):
    norm = QKNorm(NORM, per_head=True) if qk_norm else None
    attend = Attention(heads, kv_heads, positions=Rotary(base, interleaved=True), qk_norm=norm)
    return command(vocab, width, [attend] * depth, hidden, logit_scale)


def command_r7b(width, depth, heads, kv_heads, hidden, window=4096, vocab=256000, logit_scale=0.25):
    near = Attention(heads, kv_heads, positions=Rotary(50000.0, interleaved=True), window=window)
    far = Attention(heads, kv_heads, positions=None)
    return command(vocab, width, [far if i % 4 == 3 else near for i in range(depth)], hidden, logit_scale)


CONFIGS = {
    "command-r7b-nano": command_r7b(24, 5, 4, 2, 32, window=6, vocab=256),
    "command-r7b-tiny": command_r7b(128, 8, 4, 2, 256, window=128, vocab=256),
    "command-r-35b": command_r(8192, 40, 64, 64, 22528),
    "command-r-plus-104b": command_r(12288, 64, 96, 8, 33792, base=75e6, qk_norm=True, logit_scale=0.8333333333333334),
    "command-r7b": command_r7b(4096, 32, 32, 8, 14336),
}
