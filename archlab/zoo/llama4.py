"""Llama 4, its text model: iRoPE's attention, and experts of which a token goes to one, beside a shared one.

Known from its released code (2025): the gate is a sigmoid and scales what the expert reads. Scout has experts in every
layer, Maverick in every second.
"""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary, Temperature
from archlab.attention.qk_norm import QKNorm
from archlab.attention.scaling import Llama3Scaling
from archlab.experts.balance import SwitchLoss
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Parallel, Sequence
from archlab.model import LanguageModel


def llama4(width, periods, heads, kv_heads, head_size, experts, hidden, dense=None, qk_norm=True, scaling=None,
           chunk=8192, floor=8192, vocab=202048) -> LanguageModel:
    """`periods` of four layers. dense: the channels of the MLPs of every first and third; None for experts in all."""
    norm = RMSNorm(1e-5)
    near = Attention(heads, kv_heads, head_size, Rotary(500000.0, interleaved=True, scaling=scaling), chunk=chunk,
                     qk_norm=QKNorm(RMSNorm(1e-5, gain=False), after=True) if qk_norm else None)
    far = Attention(heads, kv_heads, head_size, Temperature(floor=floor))
    router = TopK(1, score="sigmoid")
    sparse = Parallel(MoE(experts, hidden, router, balance=(SwitchLoss(0.001),), scale_input=True), SwiGLU(hidden))
    plain = sparse if dense is None else SwiGLU(dense)
    unit = [Sequence(Residual(attend, norm), Residual(layer, norm))
            for attend, layer in zip((near, near, near, far), (plain, sparse, plain, sparse))]
    return LanguageModel(vocab, width, Repeat(Sequence(*unit), periods), norm, tied=False)


CONFIGS = {
    "llama4-nano": llama4(16, 1, 2, 1, 8, 4, 16, dense=24, chunk=8, floor=5, vocab=256),
    "llama4-tiny": llama4(128, 1, 4, 2, 32, 8, 128, dense=256, chunk=128, floor=256, vocab=256),
    "llama4-scout": llama4(5120, 12, 40, 8, 128, 16, 8192, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)),
    "llama4-maverick": llama4(5120, 12, 40, 8, 128, 128, 8192, dense=16384, qk_norm=False),
}
