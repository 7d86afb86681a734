"""S4 and S4D: state spaces as long convolutions (arXiv:2111.00396, arXiv:2206.11893)."""

from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.s4 import S4
from archlab.recurrence.s4d import S4D


def s4(width: int, depth: int, layer: S4 | S4D, vocab: int = 256) -> LanguageModel:
    """`depth` layers, a norm before each."""
    return LanguageModel(vocab, width, Repeat(Residual(layer, LayerNorm()), depth), LayerNorm())


def s4_wikitext(width: int, depth: int, vocab: int) -> LanguageModel:
    """The language model of S4's WikiText-103 experiments: units of two S4 layers and an MLP. Published with an
    adaptive embedding and softmax over 267,735 words; here with the plain one."""
    layer = Residual(S4(), LayerNorm())
    unit = Sequence(layer, layer, Residual(MLP(4 * width, bias=True), LayerNorm()))
    return LanguageModel(vocab, width, Repeat(unit, depth), LayerNorm())


CONFIGS = {
    "s4-nano": s4(32, 2, S4(state=8)),
    "s4-tiny": s4(256, 8, S4(state=32)),
    "s4-small": s4(512, 14, S4(state=64), vocab=512),
    "s4-wikitext103": s4_wikitext(1024, 16, vocab=50257),
    "s4d-nano": s4(32, 2, S4D(state=8)),
    "s4d-tiny": s4(256, 8, S4D(state=64)),
    "s4d-small": s4(512, 16, S4D(state=64), vocab=512),
}
