"""gpt-oss: attention with sinks, through a window in every other layer, and experts with biases and a clipped
activation in all (OpenAI 2025, arXiv:2508.10925)."""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.attention.scaling import YaRN
from archlab.experts.balance import SwitchLoss
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.mlp import ClippedSwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def gpt_oss(width, pairs, heads, kv_heads, head_size, experts, k, hidden, window=128, vocab=201088) -> LanguageModel:
    norm = RMSNorm(1e-5)
    positions = Rotary(150000.0, scaling=YaRN(32.0, 4096, truncate=False))
    experts = MoE(experts, hidden, TopK(k, renormalise=True, bias=True), balance=(SwitchLoss(),),
                  activation=ClippedSwiGLU(), bias=True)

    def block(window):
        attend = Attention(heads, kv_heads, head_size, positions, window, bias=True, out_bias=True, sinks=True)
        return Sequence(Residual(attend, norm), Residual(experts, norm))

    return LanguageModel(vocab, width, Repeat(Sequence(block(window), block(None)), pairs), norm, tied=False)


CONFIGS = {
    "gpt-oss-nano": gpt_oss(24, 1, 2, 1, 8, 4, 2, 16, window=6, vocab=256),
    "gpt-oss-tiny": gpt_oss(128, 2, 4, 2, 32, 8, 2, 96, vocab=256),
    "gpt-oss-20b": gpt_oss(2880, 12, 64, 8, 64, 32, 4, 2880),
    "gpt-oss-120b": gpt_oss(2880, 18, 64, 8, 64, 128, 4, 2880),
}
