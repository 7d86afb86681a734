"""T5: an encoder-decoder with a learned bias by distance, which all layers of a side share (arXiv:1910.10683).

RMS norms before each branch, no biases, scores not divided by sqrt(K). The first version has a ReLU MLP and takes its
logits from the embedding, over sqrt(D); version 1.1 a gated GELU one, and a head of its own (arXiv:2002.05202).
"""

from archlab.attention.attention import Attention
from archlab.attention.cross import CrossAttention
from archlab.attention.positions import RelativePositions
from archlab.attention.relative import RelativeBias
from archlab.encoder_decoder import EncoderDecoder
from archlab.layers.mlp import MLP, GeGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence


def t5(vocab, width, layers, heads, hidden, head_size=None, gated=False):
    def side(causal):
        attend = Attention(heads, head_size=head_size, positions=RelativePositions(), causal=causal, scale=1.0)
        read = [Residual(CrossAttention(heads, head_size=head_size, scale=1.0))] if causal else []
        block = Sequence(Residual(attend), *read, Residual(GeGLU(hidden) if gated else MLP(hidden, "relu")))
        return Sequence(RelativeBias(heads, causal=causal), Repeat(block, layers))

    return EncoderDecoder(vocab, width, side(causal=True), tied=not gated, logit_scale=1.0 if gated else width**-0.5,
                          encoder=side(causal=False))


VOCAB = 32128

CONFIGS = {
    "t5-nano": t5(256, 32, 1, 2, 64),
    "t5-tiny": t5(256, 128, 3, 4, 512),
    "t5-small": t5(VOCAB, 512, 6, 8, 2048),
    "t5-base": t5(VOCAB, 768, 12, 12, 3072),
    "t5-large": t5(VOCAB, 1024, 24, 16, 4096),
    "t5-3b": t5(VOCAB, 1024, 24, 32, 16384, head_size=128),
    "t5-11b": t5(VOCAB, 1024, 24, 128, 65536, head_size=128),
    "t5-v1.1-small": t5(VOCAB, 512, 8, 6, 1024, head_size=64, gated=True),
    "t5-v1.1-base": t5(VOCAB, 768, 12, 12, 2048, gated=True),
    "t5-v1.1-xl": t5(VOCAB, 2048, 24, 32, 5120, gated=True),
    "t5-v1.1-xxl": t5(VOCAB, 4096, 24, 64, 10240, gated=True),
}
