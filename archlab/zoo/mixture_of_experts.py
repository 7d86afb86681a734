"""The sparse Transformer decoder: in every block a router sends each token to two of many MLPs (Mixtral,
arXiv:2401.04088)."""

from archlab.attention.attention import Attention
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def mixture_of_experts(width: int, depth: int, heads: int, hidden: int, experts: int = 8, top_k: int = 2,
                       kv_heads: int | None = None, vocab: int = 256, **moe) -> LanguageModel:
    """`depth` blocks of attention and experts of `hidden` channels; `moe` takes the other fields of `MoE`.

    top_k: how many experts a token goes to: 1 routes as Switch does, more as Mixtral does.
    """
    router = TopK(1) if top_k == 1 else TopK(top_k, renormalise=True)
    block = Sequence(Residual(Attention(heads, kv_heads)), Residual(MoE(experts, hidden, router, **moe)))
    return LanguageModel(vocab, width, Repeat(block, depth))


CONFIGS = {
    "mixture-of-experts-nano": mixture_of_experts(width=32, depth=2, heads=4, hidden=16, kv_heads=2),
    "mixture-of-experts-tiny": mixture_of_experts(width=128, depth=4, heads=4, hidden=128),
    "mixture-of-experts-small": mixture_of_experts(width=256, depth=6, heads=8, hidden=512, kv_heads=4, vocab=512),
}
