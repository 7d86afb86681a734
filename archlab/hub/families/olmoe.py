"""OLMoE (arXiv:2409.02060): 8 of 64 small experts in every layer, queries and keys normed over all heads."""

from archlab.attention.attention import Attention
from archlab.attention.qk_norm import QKNorm
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.hub.decoders import (ATTENTION, OUTER, PRE_NORMS, read_attention, read_decoder, write_attention,
                                  write_decoder)
from archlab.hub.experts import experts_at, read_moe, write_moe
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.layers.norms import RMSNorm

DEFAULTS = dict(vocab_size=50304, hidden_size=2048, intermediate_size=2048, num_hidden_layers=16,
                num_attention_heads=16, num_key_value_heads=None, hidden_act="silu", max_position_embeddings=4096,
                rms_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=False, clip_qkv=None,
                num_experts_per_tok=8, num_experts=64, norm_topk_prob=False, router_aux_loss_coef=0.01)


def read(f):
    norm, bias = RMSNorm(f.take("rms_norm_eps")), f.take("attention_bias")
    size = f.take("hidden_size") // f.positive("num_attention_heads")
    f.only("head_dim", size, default=size)  # the norm of queries is as wide as the stream
    f.only("sliding_window", None, default=None)
    attention = read_attention(f, qk_norm=QKNorm(norm, over="all"), bias=bias, out_bias=bias, clip=f.take("clip_qkv"))
    router = TopK(f.take("num_experts_per_tok"), renormalise=f.take("norm_topk_prob"))
    block = sequential(attention, read_moe(f, "num_experts", "intermediate_size", router), norm)
    return read_decoder(f, [block] * f.take("num_hidden_layers"), norm)


def write(config):
    attention = each(config, Attention)[0]
    return {**write_decoder(config), **write_attention(config), **write_moe(config, "num_experts", "intermediate_size"),
            "rms_norm_eps": config.norm.eps, "attention_bias": attention.bias, "clip_qkv": attention.clip,
            "norm_topk_prob": each(config, MoE)[0].router.renormalise}


FAMILY = Family(("olmoe",), "OlmoeForCausalLM", DEFAULTS, read, write, OUTER,
                (Blocks(ATTENTION | PRE_NORMS | experts_at("layers/1/layer", "mlp")),))
