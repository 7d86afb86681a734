"""Gemma (arXiv:2403.08295): gains about zero, an embedding scaled by sqrt(D), a GELU gate and wide heads."""

from archlab.attention.attention import Attention
from archlab.hub.decoders import (ACTIVATIONS, BLOCK, OUTER, read_attention, read_decoder, write_attention,
                                  write_decoder, write_mlp)
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.layers.mlp import MLP
from archlab.layers.norms import RMSNorm

DEFAULTS = dict(vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
                num_attention_heads=16, num_key_value_heads=16, head_dim=256, hidden_act="gelu_pytorch_tanh",
                max_position_embeddings=8192, rms_norm_eps=1e-6, tie_word_embeddings=True,
                attention_bias=False, use_bidirectional_attention=None)


def read(f):
    norm, bias = RMSNorm(f.take("rms_norm_eps"), centred=True), f.take("attention_bias")
    f.only("use_bidirectional_attention", None, False)
    activation = f.choose("hidden_act", ACTIVATIONS | {"gelu": "gelu_tanh"})  # the first files meant tanh by "gelu"
    f.only("hidden_activation", None, "gelu_pytorch_tanh", default=None)  # said twice by some of them
    block = sequential(read_attention(f, bias=bias, out_bias=bias),
                       MLP(f.take("intermediate_size"), activation, gated=True), norm)
    return read_decoder(f, [block] * f.take("num_hidden_layers"), norm, embedding_scale=f.take("hidden_size") ** 0.5)


def write(config):
    return {**write_decoder(config), **write_attention(config), **write_mlp(config), "rms_norm_eps": config.norm.eps,
            "attention_bias": each(config, Attention)[0].bias}


FAMILY = Family(("gemma",), "GemmaForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
