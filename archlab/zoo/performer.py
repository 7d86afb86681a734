"""Performer: softmax attention estimated by random features, linear in time (arXiv:2009.14794)."""

from archlab.attention.performer import Performer
from archlab.layers.mlp import MLP
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def performer(width: int, depth: int, heads: int, hidden: int, vocab: int = 256, **attention) -> LanguageModel:
    """`depth` blocks of FAVOR+ attention and MLP; `attention` takes the fields of `Performer`."""
    block = Sequence(Residual(Performer(heads, **attention)), Residual(MLP(hidden)))
    return LanguageModel(vocab, width, Repeat(block, depth))


CONFIGS = {
    "performer-nano": performer(width=32, depth=2, heads=4, hidden=96, kv_heads=2, chunk=4),
    "performer-tiny": performer(width=128, depth=6, heads=4, hidden=512),
    "performer-small": performer(width=256, depth=6, heads=8, hidden=1024, vocab=512),
}
