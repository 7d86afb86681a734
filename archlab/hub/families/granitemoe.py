"""Granite 3 MoE (IBM 2024): Granite with experts in every layer, all of a layer's in one tensor."""

from archlab.attention.attention import Attention
from archlab.experts.routers import TopK
from archlab.hub.decoders import (ATTENTION, OUTER, PRE_NORMS, read_attention, read_decoder, write_attention,
                                  write_decoder)
from archlab.hub.experts import read_moe, write_moe
from archlab.hub.family import Blocks, Family, each
from archlab.layers.mlp import MLP
from archlab.layers.norms import RMSNorm
from archlab.layers.residual import Residual
from archlab.layers.sequence import Parallel, Sequence

DEFAULTS = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=None, hidden_act="silu", max_position_embeddings=2048,
                rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False, embedding_multiplier=1.0,
                logits_scaling=1.0, residual_multiplier=1.0, attention_multiplier=1.0, num_local_experts=8,
                num_experts_per_tok=2, router_aux_loss_coef=0.001)


def experts_at(path):
    """The table of a layer's experts."""
    return {f"{path}/{{gate,up}}": "block_sparse_moe.input_linear.weight",
            f"{path}/down": "block_sparse_moe.output_linear.weight",
            f"{path}/router/weight": "block_sparse_moe.router.layer.weight"}


def read(f, shared=0):
    """shared: the hidden channels of an MLP beside the experts; 0 for none."""
    norm, bias, scale = RMSNorm(f.take("rms_norm_eps")), f.take("attention_bias"), f.take("residual_multiplier")
    f.only("mlp_bias", False, default=False)
    attention = read_attention(f, bias=bias, out_bias=bias, scale=f.take("attention_multiplier"))
    router = TopK(f.take("num_experts_per_tok"), renormalise=True)
    experts = read_moe(f, "num_local_experts", "intermediate_size", router)
    layer = Parallel(experts, MLP(shared, experts.activation, gated=True)) if shared else experts
    block = Sequence(Residual(attention, norm, scale=scale), Residual(layer, norm, scale=scale))
    return read_decoder(f, [block] * f.take("num_hidden_layers"), norm, logit_scale=1 / f.positive("logits_scaling"),
                        embedding_scale=f.take("embedding_multiplier"))


def write(config):
    attention, sizes = each(config, Attention)[0], write_attention(config)
    return {**write_decoder(config), **sizes, **write_moe(config, "num_local_experts", "intermediate_size"),
            "rms_norm_eps": config.norm.eps, "attention_bias": attention.bias,
            "attention_multiplier": attention.scale or sizes["head_dim"] ** -0.5,
            "residual_multiplier": each(config, Residual)[0].scale, "embedding_multiplier": config.embedding_scale,
            "logits_scaling": 1 / config.logit_scale}


FAMILY = Family(("granitemoe",), "GraniteMoeForCausalLM", DEFAULTS, read, write, OUTER,
                (Blocks(ATTENTION | PRE_NORMS | experts_at("layers/1/layer")),))
