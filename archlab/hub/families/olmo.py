"""OLMo (arXiv:2402.00838): Llama with LayerNorms that have no parameters, and queries, keys and values clipped."""

from archlab.attention.attention import Attention
from archlab.hub.decoders import (BLOCK, OUTER, read_attention, read_decoder, read_mlp, write_attention, write_decoder,
                                  write_mlp)
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.layers.norms import LayerNorm

DEFAULTS = dict(vocab_size=50304, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=None, hidden_act="silu",
                max_position_embeddings=2048, tie_word_embeddings=False, attention_bias=False, clip_qkv=None)
NORM = LayerNorm(1e-5, bias=False, gain=False)


def read(f):
    bias = f.take("attention_bias")
    attention = read_attention(f, bias=bias, out_bias=bias, clip=f.take("clip_qkv"))
    return read_decoder(f, [sequential(attention, read_mlp(f), NORM)] * f.take("num_hidden_layers"), NORM)


def write(config):
    attention = each(config, Attention)[0]
    return {**write_decoder(config), **write_attention(config), **write_mlp(config), "attention_bias": attention.bias,
            "clip_qkv": attention.clip}


FAMILY = Family(("olmo",), "OlmoForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
