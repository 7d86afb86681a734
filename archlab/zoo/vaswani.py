"""The Transformer of 2017: encoder and decoder, norms after each branch, sinusoids added to the embedding.

Vaswani et al. 2017 (arXiv:1706.03762). One table serves both texts and the head; embeddings are multiplied by sqrt(D);
dropout of 0.1 on each branch in the training form (the paper also drops out of the embedded text, which is left out).
"""

from archlab.attention.attention import Attention
from archlab.attention.cross import CrossAttention
from archlab.encoder_decoder import EncoderDecoder
from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm
from archlab.layers.positions import SinusoidalPositions
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence


def vaswani(vocab, width, layers, heads, hidden, dropout=0.1):
    post_norm = lambda layer: Residual(layer, before=None, outer=LayerNorm(), dropout=dropout)

    def side(causal):
        attend = Attention(heads, positions=None, causal=causal)
        read = [post_norm(CrossAttention(heads))] if causal else []
        block = Sequence(post_norm(attend), *read, post_norm(MLP(hidden, "relu", bias=True)))
        return Sequence(SinusoidalPositions(), Repeat(block, layers))

    return EncoderDecoder(vocab, width, side(causal=True), norm=None, embedding_scale=width**0.5,
                          encoder=side(causal=False), encoder_norm=None)


CONFIGS = {
    "transformer-2017-nano": vaswani(256, 32, 1, 2, 64),
    "transformer-2017-tiny": vaswani(256, 128, 3, 4, 512),
    "transformer-2017-base": vaswani(37000, 512, 6, 8, 2048),
    "transformer-2017-big": vaswani(37000, 1024, 6, 16, 4096, dropout=0.3),
}
