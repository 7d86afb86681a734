"""Switch Transformer: T5 with experts in every other layer, and one expert for a token (arXiv:2101.03961, table 9).

Jitter on the router's input, a capacity of 1.25, and initial weights of a tenth of the usual variance keep so many
experts stable (sections 2.2 and 2.4).
"""

from archlab.attention.attention import Attention
from archlab.attention.cross import CrossAttention
from archlab.attention.positions import RelativePositions
from archlab.attention.relative import RelativeBias
from archlab.encoder_decoder import EncoderDecoder
from archlab.experts.balance import SwitchLoss
from archlab.experts.capacity import Capacity
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.mlp import MLP
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence


def switch(vocab, width, layers, heads, hidden, experts, head_size=64, activation="gelu_tanh", gated=True, every=2):
    """`layers` a side, every second with experts (Switch-C: all)."""
    dense = MLP(hidden, activation, gated)
    sparse = MoE(experts, hidden, TopK(1, jitter=0.01), Capacity(1.25), (SwitchLoss(0.01),), activation, gated,
                 init_scale=0.1)

    def side(causal):
        attend = Attention(heads, head_size=head_size, positions=RelativePositions(), causal=causal, scale=1.0)
        read = [Residual(CrossAttention(heads, head_size=head_size, scale=1.0))] if causal else []
        block = lambda layer: Sequence(Residual(attend), *read, Residual(layer))
        unit = Sequence(*[block(dense)] * (every - 1), block(sparse))
        return Sequence(RelativeBias(heads, causal=causal), Repeat(unit, layers // every))

    return EncoderDecoder(vocab, width, side(causal=True), logit_scale=width**-0.5, encoder=side(causal=False))


VOCAB = 32128
PLAIN = dict(activation="relu", gated=False)

CONFIGS = {
    "switch-nano": switch(256, 24, 2, 2, 32, experts=4, head_size=8),
    "switch-tiny": switch(256, 96, 2, 4, 192, experts=8, head_size=24),
    "switch-base-128": switch(VOCAB, 768, 12, 12, 3072, experts=128, **PLAIN),
    "switch-large-128": switch(VOCAB, 1024, 24, 16, 4096, experts=128, **PLAIN),
    "switch-xxl-128": switch(VOCAB, 4096, 24, 64, 10240, experts=128),
    "switch-c-2048": switch(VOCAB, 2080, 15, 32, 6144, experts=2048, every=1, **PLAIN),
}
