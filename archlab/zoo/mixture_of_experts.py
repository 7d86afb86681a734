"""The sparse Transformer decoder: in every block a router sends each token to a few of many MLPs.

Two of eight, as in Mixtral (arXiv:2401.04088), unless another router is given: experts that choose their tokens
(arXiv:2202.09368), a gate over groups and one within (arXiv:1701.06538, appendix B), or several routers in stages, by
which a token may also skip the layer.
"""

from archlab.attention.attention import Attention
from archlab.experts.balance import SwitchLoss, ZLoss
from archlab.experts.expert_choice import ExpertChoice
from archlab.experts.hierarchical import Hierarchical
from archlab.experts.mixture_of_routers import MixtureOfRouters
from archlab.experts.moe import MoE
from archlab.experts.routers import Router, TopK
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


def mixture_of_experts(width: int, depth: int, heads: int, hidden: int, experts: int = 8,
                       router: Router = TopK(2, renormalise=True), kv_heads: int | None = None, vocab: int = 256,
                       **moe) -> LanguageModel:
    """`depth` blocks of attention and experts of `hidden` channels; `moe` takes the other fields of `MoE`."""
    block = Sequence(Residual(Attention(heads, kv_heads)), Residual(MoE(experts, hidden, router, **moe)))
    return LanguageModel(vocab, width, Repeat(block, depth))


NANO, TINY = dict(width=24, depth=1, heads=2, hidden=16), dict(width=128, depth=4, heads=4, hidden=128)
CHOICE = dict(router=ExpertChoice(2.0), balance=(ZLoss(),))  # even by construction
LEVELS = dict(router=Hierarchical(groups=4), balance=(ZLoss(),))  # has losses of its own
STAGES = dict(balance=(SwitchLoss(), ZLoss()))

CONFIGS = {
    "mixture-of-experts-nano": mixture_of_experts(width=32, depth=2, heads=4, hidden=16, kv_heads=2),
    "mixture-of-experts-tiny": mixture_of_experts(**TINY),
    "mixture-of-experts-small": mixture_of_experts(width=256, depth=6, heads=8, hidden=512, kv_heads=4, vocab=512),
    "expert-choice-nano": mixture_of_experts(**NANO, **CHOICE),
    "expert-choice-tiny": mixture_of_experts(**TINY, **CHOICE),
    "hierarchical-experts-nano": mixture_of_experts(**NANO, **LEVELS),
    "hierarchical-experts-tiny": mixture_of_experts(**TINY, experts=16, **LEVELS),
    "mixture-of-routers-nano": mixture_of_experts(**NANO, **STAGES, router=MixtureOfRouters((6, 4, 2), skip=True)),
    "mixture-of-routers-tiny": mixture_of_experts(**TINY, **STAGES, experts=16,
                                                  router=MixtureOfRouters((8, 4, 2), skip=True, price=0.01)),
}
