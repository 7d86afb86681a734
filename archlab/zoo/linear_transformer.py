"""The linear Transformer: attention with elu(x) + 1 features, a recurrent network in decoding (arXiv:2006.16236)."""

from archlab.attention.linear import LinearAttention
from archlab.layers.mlp import MLP
from archlab.layers.positions import SinusoidalPositions
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def linear_transformer(width: int, depth: int, heads: int, hidden: int, vocab: int = 256,
                       **attention) -> LanguageModel:
    """Sinusoids, `depth` blocks of linear attention and MLP; `attention` takes the fields of `LinearAttention`."""
    block = Sequence(Residual(LinearAttention(heads, **attention)), Residual(MLP(hidden)))
    body = Sequence(SinusoidalPositions(), Repeat(block, depth))
    return LanguageModel(vocab, width, body, embedding_scale=width**0.5)


CONFIGS = {
    "linear-transformer-nano": linear_transformer(width=32, depth=2, heads=4, hidden=96, chunk=4),
    "linear-transformer-tiny": linear_transformer(width=128, depth=6, heads=4, hidden=512),
    "linear-transformer-small": linear_transformer(width=256, depth=6, heads=8, hidden=1024, vocab=512),
}
