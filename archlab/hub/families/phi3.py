"""Phi 3, 3.5, 4 and 4-mini (arXiv:2404.14219, arXiv:2412.08905): Llama with fused matrices, LongRoPE and partly
turned heads."""

from archlab.attention.attention import Attention
from archlab.attention.scaling import LongRoPE
from archlab.hub.decoders import (OUTER, PRE_NORMS, read_attention, read_decoder, read_mlp, read_sizes,
                                  write_attention, write_decoder, write_mlp)
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.hub.rope import read_rotary
from archlab.layers.norms import RMSNorm

DEFAULTS = dict(vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=None, hidden_act="silu",
                max_position_embeddings=4096, original_max_position_embeddings=4096, rms_norm_eps=1e-5,
                tie_word_embeddings=False, sliding_window=None)

BLOCK = PRE_NORMS | {"layers/0/layer/{query,key,value}": "self_attn.qkv_proj.weight",
                     "layers/0/layer/out": "self_attn.o_proj.weight",
                     "layers/1/layer/{gate,up}": "mlp.gate_up_proj.weight",
                     "layers/1/layer/down": "mlp.down_proj.weight"}


def read(f):
    norm, positions = RMSNorm(f.take("rms_norm_eps")), read_rotary(f, read_sizes(f)["head_size"], share=1.0)
    if not isinstance(positions.scaling, LongRoPE | None):
        f.refuse(f"positions are stretched by {type(positions.scaling).__name__}; this family has longrope alone")
    for field, value in (("attention_bias", False), ("mlp_bias", False), ("lm_head_bias", False), ("full_attn_mod", 1),
                         ("interpolate_factor", 1)):  # of the files' own code
        f.only(field, value, default=value)
    attention = read_attention(f, positions=positions, window=f.take("sliding_window"))
    return read_decoder(f, [sequential(attention, read_mlp(f), norm)] * f.take("num_hidden_layers"), norm)


def write(config):
    return {**write_decoder(config), **write_attention(config), **write_mlp(config), "rms_norm_eps": config.norm.eps,
            "sliding_window": each(config, Attention)[0].window}


FAMILY = Family(("phi3",), "Phi3ForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
