"""BERT: an encoder that sees both ways and guesses hidden tokens (Devlin et al. 2018, arXiv:1810.04805).

Learned positions, norms after each branch and of the embedded text, biases everywhere. Left out are what later encoders
left out too: sentence types and their task, and the dense layer before the head (RoBERTa keeps the latter).
"""

from archlab.attention.attention import Attention
from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm, Normalise
from archlab.layers.positions import LearnedPositions
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel

NORM = LayerNorm(1e-12)


def bert(vocab, width, layers, heads, length=512):
    post_norm = lambda layer: Residual(layer, before=None, outer=NORM, dropout=0.1)
    attend = Attention(heads, positions=None, causal=False, bias=True, out_bias=True)
    block = Sequence(post_norm(attend), post_norm(MLP(4 * width, "gelu", bias=True)))
    body = Sequence(LearnedPositions(length), Normalise(NORM), Repeat(block, layers))
    return LanguageModel(vocab, width, body, norm=None, head_bias=True)


CONFIGS = {
    "bert-nano": bert(256, 32, 1, 2, length=256),
    "bert-tiny": bert(256, 128, 6, 4),
    "bert-base": bert(30522, 768, 12, 12),
    "bert-large": bert(30522, 1024, 24, 16),
}
