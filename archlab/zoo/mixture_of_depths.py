"""Mixture-of-Depths: every second block is for an eighth of the tokens only (arXiv:2404.02258). Blocks are those of
our Transformer."""

from archlab.attention.attention import Attention
from archlab.depth.mixture_of_depths import MixtureOfDepths
from archlab.depth.top_tokens import RandomTokens, TopTokens
from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def mixture_of_depths(width: int, depth: int, heads: int, hidden: int, vocab: int = 256, capacity: float = 0.125,
                      router: TopTokens | RandomTokens = TopTokens(gate="linear"), **attention) -> LanguageModel:
    """`depth` blocks, every second one routed; `attention` takes the fields of `Attention`."""
    block = Sequence(Residual(Attention(heads, **attention)), Residual(SwiGLU(hidden)))
    return LanguageModel(vocab, width, Repeat(Sequence(block, MixtureOfDepths(block, capacity, router)), depth // 2))


CONFIGS = {
    "mixture-of-depths-nano": mixture_of_depths(width=32, depth=4, heads=4, hidden=64, kv_heads=2, capacity=0.25),
    "mixture-of-depths-tiny": mixture_of_depths(width=128, depth=6, heads=4, hidden=344),
    "mixture-of-depths-small": mixture_of_depths(width=384, depth=6, heads=6, hidden=1024, vocab=512),
}
