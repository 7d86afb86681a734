"""Griffin and Hawk (De et al. 2024, arXiv:2402.19427), and RecurrentGemma (arXiv:2404.07839), which is Griffin.

Hawk: recurrent blocks only. Griffin: two recurrent blocks, then local attention with one head of keys and values, and
so on. After each comes a gated MLP, 3 times as wide as the stream. Positions turn half of each head's channels.

The 7 billion sizes are those of the released code, with its vocabulary.
"""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.layers.mlp import GeGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import stack
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.rg_lru import RGLRU

NORM = RMSNorm(centred=True)


def griffin(width: int, depth: int, heads: int, channels: int | None = None, pattern: str = "RRA", window: int = 1024,
            init: str = "paper", vocab: int = 256, **model) -> LanguageModel:
    """`depth` blocks, R recurrent or A attention, as `pattern` says over and over; gates have as many blocks as
    attention has heads. channels: of the recurrence; model: more fields of `LanguageModel`."""
    size = width // heads
    mixers = {"R": RGLRU(heads, channels, init=init),
              "A": Attention(heads, 1, size, Rotary(size=size // 2), window, out_bias=True)}
    mlp = Residual(GeGLU(3 * width, bias=True), NORM)
    blocks = [Sequence(Residual(mixers[pattern[i % len(pattern)]], NORM), mlp) for i in range(depth)]
    return LanguageModel(vocab, width, stack(blocks)[0], NORM, **model)


def recurrent_gemma(width: int, depth: int, heads: int, scale: float) -> LanguageModel:
    """scale: of the embeddings: sqrt(width), which the released models round to bfloat16."""
    return griffin(width, depth, heads, window=2048, init="code", vocab=256000, embedding_scale=scale, logit_cap=30.0)


CONFIGS = {
    "hawk-tiny": griffin(128, 6, 4, pattern="R"),
    "hawk-small": griffin(320, 6, 5, 400, pattern="R", vocab=512),
    "griffin-nano": griffin(24, 3, 3, 36, window=6),
    "griffin-tiny": griffin(128, 6, 4, window=128),
    "griffin-small": griffin(320, 7, 5, 400, vocab=512),
    "hawk-7b": griffin(4096, 32, 32, 5632, pattern="R", vocab=256000),
    "griffin-7b": griffin(4096, 32, 32, 5632, vocab=256000),
    "recurrentgemma-2b": recurrent_gemma(2560, 26, 10, scale=50.5),
    "recurrentgemma-9b": recurrent_gemma(4096, 38, 16, scale=64.0),
}
