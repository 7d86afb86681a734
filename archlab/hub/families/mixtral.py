"""Mixtral 8x7B and 8x22B (arXiv:2401.04088): Mistral with two of eight experts in every layer."""

from archlab.attention.attention import Attention
from archlab.experts.routers import TopK
from archlab.hub.decoders import (ATTENTION, OUTER, PRE_NORMS, read_attention, read_decoder, write_attention,
                                  write_decoder)
from archlab.hub.experts import read_moe, write_moe
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.layers.norms import RMSNorm

DEFAULTS = dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8, head_dim=None, hidden_act="silu",
                max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False, sliding_window=None,
                num_experts_per_tok=2, num_local_experts=8, router_aux_loss_coef=0.001)

EXPERTS = {"layers/1/layer/{gate,up,down}": "block_sparse_moe.experts.{e}.{w1,w3,w2}.weight",
           "layers/1/layer/router/weight": "block_sparse_moe.gate.weight"}


def read(f):
    norm = RMSNorm(f.take("rms_norm_eps"))
    moe = read_moe(f, "num_local_experts", "intermediate_size", TopK(f.take("num_experts_per_tok"), renormalise=True))
    block = sequential(read_attention(f, window=f.take("sliding_window") or None), moe, norm)
    return read_decoder(f, [block] * f.take("num_hidden_layers"), norm)


def write(config):
    return {**write_decoder(config), **write_attention(config),
            **write_moe(config, "num_local_experts", "intermediate_size"), "rms_norm_eps": config.norm.eps,
            "sliding_window": each(config, Attention)[0].window}


FAMILY = Family(("mixtral",), "MixtralForCausalLM", DEFAULTS, read, write, OUTER,
                (Blocks(ATTENTION | PRE_NORMS | EXPERTS),))
