"""Lightning attention: in every layer, as TransNormerLLM has it (arXiv:2307.14995), and in seven layers of eight beside
softmax attention and experts, as in MiniMax-01 (arXiv:2501.08313).

TransNormerLLM's own layers differ in little: values and gates have no activation, and the first layer rotates channels.
"""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.experts.balance import SwitchLoss
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.config import LayerConfig
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import Normalise, RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.lightning import LightningAttention, LinearSlopes


def lightning(width: int, depth: int, heads: int, hidden: int, vocab: int = 256) -> LanguageModel:
    """`depth` blocks of lightning attention and a gated MLP, under norms without gains."""
    norm = RMSNorm(gain=False)
    mixer = LightningAttention(heads, slopes=LinearSlopes(), norm=norm)
    block = Sequence(Residual(mixer, norm), Residual(SwiGLU(hidden), norm))
    return LanguageModel(vocab, width, Repeat(block, depth), norm)


def minimax(width: int, units: int, heads: int, kv_heads: int, head_size: int, experts: int, hidden: int,
            vocab: int = 256, lightning: int = 7) -> LanguageModel:
    """`units` times `lightning` layers of lightning attention and one of softmax attention, each before experts.

    What passes a layer is its normalised input n: alpha n + f(n), with DeepNorm's alpha = (2 layers)^(1/4). A common
    factor means nothing before the next norm, so here it is n + f(n) / alpha.
    """
    norm, layers = RMSNorm(1e-5), units * (lightning + 1)

    def branch(layer: LayerConfig) -> Sequence:
        return Sequence(Normalise(norm), Residual(layer, None, scale=(2 * layers) ** -0.25))

    fast = branch(LightningAttention(heads, head_size, norm=norm))
    full = branch(Attention(heads, kv_heads, head_size, Rotary(1e7, size=head_size // 2)))
    mlp = branch(MoE(experts, hidden, TopK(2, renormalise=True), balance=(SwitchLoss(0.001),)))
    unit = Sequence(Repeat(Sequence(fast, mlp), lightning), full, mlp)
    return LanguageModel(vocab, width, Repeat(unit, units), norm, tied=False)


CONFIGS = {
    "lightning-nano": lightning(width=24, depth=2, heads=3, hidden=32),
    "lightning-tiny": lightning(width=128, depth=6, heads=4, hidden=352),
    "lightning-small": lightning(width=320, depth=8, heads=5, hidden=736, vocab=512),
    "minimax-nano": minimax(24, 1, 3, 1, 8, experts=4, hidden=16, lightning=1),
    "minimax-tiny": minimax(128, 1, 4, 2, 32, experts=4, hidden=160, lightning=3),
    "minimax-01-456b": minimax(6144, 10, 64, 8, 128, experts=32, hidden=9216, vocab=200064),
}
