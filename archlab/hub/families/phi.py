"""Phi 1 to 2 (arXiv:2306.11644, arXiv:2309.05463): attention and MLP side by side on one norm, biases everywhere."""

from archlab.attention.attention import Attention
from archlab.attention.qk_norm import QKNorm
from archlab.hub.decoders import (read_attention, read_decoder, read_mlp, read_sizes, write_attention, write_decoder,
                                  write_mlp)
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import PARALLEL, parallel, placed
from archlab.hub.rope import read_rotary
from archlab.layers.norms import LayerNorm

DEFAULTS = dict(vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
                num_attention_heads=32, num_key_value_heads=None, hidden_act="gelu_new", max_position_embeddings=2048,
                layer_norm_eps=1e-5, tie_word_embeddings=False, qk_layernorm=False)

OUTER = {"embed/table": "model.embed_tokens.weight", "norm/{scale,bias}": "model.final_layernorm.{weight,bias}",
         "head/weight": "lm_head.weight", "head_bias": "lm_head.bias"}
BLOCK = placed({"norm1/{scale,bias}": "input_layernorm.{weight,bias}",
                "attention/{query,key,value}{,_bias}": "self_attn.{q,k,v}_proj.{weight,bias}",
                "attention/out{,_bias}": "self_attn.dense.{weight,bias}",
                "attention/{query,key}_norm/{scale,bias}": "self_attn.{q,k}_layernorm.{weight,bias}",
                "mlp/{up,down}{,_bias}": "mlp.fc{1,2}.{weight,bias}"}, PARALLEL)


def read(f):
    norm = LayerNorm(f.take("layer_norm_eps"))
    attention = read_attention(f, positions=read_rotary(f, read_sizes(f)["head_size"], share=0.5), bias=True,
                               out_bias=True, qk_norm=QKNorm(norm) if f.take("qk_layernorm") else None)
    block = parallel(attention, read_mlp(f, gated=False, bias=True), norm)
    return read_decoder(f, [block] * f.take("num_hidden_layers"), norm, head_bias=True)


def write(config):
    return {**write_decoder(config), **write_attention(config, partial=True), **write_mlp(config),
            "layer_norm_eps": config.norm.eps, "qk_layernorm": each(config, Attention)[0].qk_norm is not None}


FAMILY = Family(("phi",), "PhiForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
