"""DeepSeek-V3 and R1 (arXiv:2412.19437), Moonlight: V2 with routers that score by sigmoids and choose with a bias. The
layer that predicts the token after the next, which published files have beyond the last, is left out."""

from archlab.attention.latent import LatentAttention
from archlab.experts.moe import MoE
from archlab.experts.routers import Groups, TopK
from archlab.hub.decoders import OUTER
from archlab.hub.families import deepseek_v2
from archlab.hub.family import Blocks, Family, each

DEFAULTS = {name: value for name, value in deepseek_v2.DEFAULTS.items() if name != "topk_method"} | dict(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61, num_attention_heads=128,
    max_position_embeddings=4096, first_k_dense_replace=3, n_routed_experts=256, n_shared_experts=1,
    moe_intermediate_size=2048, num_experts_per_tok=8, routed_scaling_factor=2.5, n_group=8, topk_group=4,
    norm_topk_prob=True, rope_interleave=True)
RATE = 0.001  # at which the bias of the choice is moved in training; no file says it


def read(f):
    f.only("scoring_func", "sigmoid", default="sigmoid")
    f.only("topk_method", "noaux_tc", default="noaux_tc")
    count, keep = f.positive("n_group"), f.positive("topk_group")
    router = TopK(f.take("num_experts_per_tok"), "sigmoid", bool(f.take("norm_topk_prob")),
                  f.positive("routed_scaling_factor"), Groups(count, keep, best=2) if count > 1 else None,
                  balance_rate=RATE)
    return deepseek_v2.read_model(f, router, interleaved=bool(f.take("rope_interleave")))


def write(config):
    router = each(config, MoE)[0].router
    return {**deepseek_v2.write_model(config), "norm_topk_prob": router.renormalise,
            "n_group": router.groups.count if router.groups else 1,
            "topk_group": router.groups.keep if router.groups else 1,
            "rope_interleave": each(config, LatentAttention)[0].positions.interleaved}


def beyond(config):
    """The tensors after the last layer."""
    return (f"*.layers.{len(each(config, LatentAttention))}.*",)


FAMILY = Family(("deepseek_v3",), "DeepseekV3ForCausalLM", DEFAULTS, read, write, OUTER,
                (Blocks(deepseek_v2.BLOCK),), buffers=beyond)
