"""DeepSeek's mixtures of experts: many small experts beside shared ones that every token passes, after dense first
layers. DeepSeekMoE (arXiv:2401.06066); V2 (arXiv:2405.04434) with attention through a latent; V3 (arXiv:2412.19437),
whose routers score by sigmoids and are balanced by a bias that no gradient moves; Kimi K2 (arXiv:2507.20534) is V3 with
more experts, fewer heads and no groups.
"""

from archlab.attention.attention import Attention
from archlab.attention.latent import LatentAttention
from archlab.attention.positions import Rotary
from archlab.attention.scaling import YaRN
from archlab.experts.balance import SwitchLoss
from archlab.experts.moe import MoE
from archlab.experts.routers import Groups, TopK
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Parallel, Sequence
from archlab.model import LanguageModel


def deepseek(width, layers, attention, experts, hidden, router, shared, dense, first=1, balance=(SwitchLoss(0.003),),
             vocab=102400) -> LanguageModel:
    """`first` layers with an MLP of `dense` channels; then layers of `experts`, `hidden` channels each, beside `shared`
    experts of as many, which are one MLP."""
    norm = RMSNorm()
    block = lambda layer: Sequence(Residual(attention, norm), Residual(layer, norm))
    sparse = Parallel(MoE(experts, hidden, router, balance=balance), SwiGLU(shared * hidden))
    body = Sequence(*[block(SwiGLU(dense))] * first, Repeat(block(sparse), layers - first))
    return LanguageModel(vocab, width, body, norm, tied=False)


def latent(heads, query_rank=None, far=None, rank=512, **sizes) -> LatentAttention:
    """far: by how much the published texts are longer than the 4,096 tokens of pre-training, and YaRN's mscale."""
    scaling = None if far is None else YaRN(far[0], 4096, mscale=far[1], mscale_all_dim=far[1])
    return LatentAttention(heads, rank, query_rank, positions=Rotary(interleaved=True, scaling=scaling), **sizes)


def version_3(k, groups=None, scale=2.5) -> dict:
    """Its router and its losses."""
    router = TopK(k, "sigmoid", renormalise=True, scale=scale, groups=groups, balance_rate=0.001)
    return {"router": router, "balance": (SwitchLoss(1e-4, per="sequence"),)}


SMALL = dict(rank=8, query_rank=12, content_size=4, rotary_size=4, value_size=6)

CONFIGS = {
    "deepseek-nano": deepseek(24, 2, latent(2, **SMALL), 8, 8, shared=1, dense=32, vocab=256,
                              **version_3(3, Groups(4, keep=2, best=2))),
    "deepseek-tiny": deepseek(128, 4, latent(4, rank=32, content_size=32, rotary_size=16, value_size=32), 16, 64,
                              shared=1, dense=384, vocab=256, **version_3(3)),
    "deepseek-moe-16b": deepseek(2048, 28, Attention(16), 64, 1408, TopK(6), shared=2, dense=10944),
    "deepseek-v2-lite": deepseek(2048, 27, latent(16, far=(40, 0.707)), 64, 1408, TopK(6), shared=2, dense=10944),
    "deepseek-v2": deepseek(5120, 60, latent(128, 1536, far=(40, 1.0)), 160, 1536,
                            TopK(6, groups=Groups(8, keep=3), scale=16.0), shared=2, dense=12288),
    "deepseek-v3": deepseek(7168, 61, latent(128, 1536, far=(40, 1.0)), 256, 2048, shared=1, dense=18432, first=3,
                            vocab=129280, **version_3(8, Groups(8, keep=4, best=2))),
    "kimi-k2": deepseek(7168, 61, latent(64, 1536, far=(32, 1.0)), 384, 2048, shared=1, dense=18432, vocab=163840,
                        **version_3(8, scale=2.827)),
}
