"""Gemma: gains counted from one, embeddings times sqrt(D), gated GELU, large heads.

1: arXiv:2403.08295. 2 (arXiv:2408.00118): norms before and after each branch, soft caps on scores and logits, a window
in every other layer. 3 (arXiv:2503.19786): norms on queries and keys instead of the caps, five layers with a window to
one without, each with rotary positions of its own.
"""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.attention.qk_norm import QKNorm
from archlab.attention.scaling import LinearScaling
from archlab.layers.mlp import GeGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import stack
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel

NORM = RMSNorm(centred=True)


def gemma(vocab, width, attentions, hidden, sandwich=True, **model) -> LanguageModel:
    """attentions: one for each layer."""
    branch = lambda layer: Residual(layer, NORM, after=NORM if sandwich else None)
    blocks = [Sequence(branch(attention), branch(GeGLU(hidden))) for attention in attentions]
    return LanguageModel(vocab, width, stack(blocks)[0], NORM, embedding_scale=width**0.5, **model)


def gemma1(width, depth, heads, kv_heads, hidden, head_size=256, vocab=256000):
    return gemma(vocab, width, [Attention(heads, kv_heads, head_size)] * depth, hidden, sandwich=False)


def gemma2(width, depth, heads, kv_heads, hidden, head_size=256, window=4096, scale=None, vocab=256000):
    near = Attention(heads, kv_heads, head_size, window=window, cap=50.0, scale=scale)
    far = near.set("window", None)
    return gemma(vocab, width, [near, far] * (depth // 2), hidden, logit_cap=30.0)


def gemma3(width, depth, heads, kv_heads, hidden, head_size=256, window=512, factor=None, scale=None, vocab=262144):
    near = Attention(heads, kv_heads, head_size, window=window, qk_norm=QKNorm(NORM), scale=scale)
    far = near.set("window", None).set("positions", Rotary(1e6, scaling=LinearScaling(factor) if factor else None))
    return gemma(vocab, width, [far if i % 6 == 5 else near for i in range(depth)], hidden)


CONFIGS = {
    "gemma2-nano": gemma2(32, 2, 4, 2, 48, head_size=8, window=6, vocab=256),
    "gemma2-tiny": gemma2(128, 6, 4, 2, 256, head_size=32, window=128, vocab=256),
    "gemma3-nano": gemma3(24, 7, 2, 1, 24, head_size=8, window=6, factor=8.0, vocab=256),
    "gemma3-tiny": gemma3(128, 6, 4, 2, 256, head_size=32, window=128, vocab=256),
    "gemma-2b": gemma1(2048, 18, 8, 1, 16384),
    "gemma-7b": gemma1(3072, 28, 16, 16, 24576),
    "gemma2-2b": gemma2(2304, 26, 8, 4, 9216),
    "gemma2-9b": gemma2(3584, 42, 16, 8, 14336),
    "gemma2-27b": gemma2(4608, 46, 32, 16, 36864, head_size=128, scale=144**-0.5),
    "gemma3-270m": gemma3(640, 18, 4, 1, 2048),
    "gemma3-1b": gemma3(1152, 26, 4, 1, 6912),
    "gemma3-4b": gemma3(2560, 34, 8, 4, 10240, window=1024, factor=8.0, vocab=262208),
}
