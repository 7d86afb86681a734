"""iRoPE, the attention of Llama 4: three layers that see their own chunk of the text, with rotary positions, to one
that sees all of it and has none, whose queries grow with the length of the text.

Known from its released code (2025). The turned queries and keys are normed, without gains. Llama 4 itself has experts
for its MLPs; these are dense.
"""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary, Temperature
from archlab.attention.qk_norm import QKNorm
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def irope(width, periods, heads, kv_heads, hidden, chunk=8192, floor=8192, vocab=256) -> LanguageModel:
    norm = QKNorm(RMSNorm(gain=False), after=True)
    near = Attention(heads, kv_heads, positions=Rotary(500000.0, interleaved=True), chunk=chunk, qk_norm=norm)
    far = Attention(heads, kv_heads, positions=Temperature(floor=floor))
    unit = [Sequence(Residual(attend), Residual(SwiGLU(hidden))) for attend in (near, near, near, far)]
    return LanguageModel(vocab, width, Repeat(Sequence(*unit), periods))


CONFIGS = {
    "irope-nano": irope(24, 1, 4, 2, 48, chunk=8, floor=5),
    "irope-tiny": irope(128, 2, 4, 2, 256, chunk=128, floor=256),
}
