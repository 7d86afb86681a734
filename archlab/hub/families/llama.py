"""Llama 1 to 3 (arXiv:2302.13971, arXiv:2307.09288, arXiv:2407.21783) and the many models of its form."""

from archlab.attention.attention import Attention
from archlab.hub.decoders import (BLOCK, OUTER, read_attention, read_decoder, read_mlp, write_attention, write_decoder,
                                  write_mlp)
from archlab.hub.family import Blocks, Family, each
from archlab.layers.mlp import MLP
from archlab.layers.norms import RMSNorm
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence

DEFAULTS = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=None, head_dim=None, hidden_act="silu",
                max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False,
                mlp_bias=False)


def read(f):
    norm, bias = RMSNorm(f.take("rms_norm_eps")), f.take("attention_bias")
    block = Sequence(Residual(read_attention(f, bias=bias, out_bias=bias), norm),
                     Residual(read_mlp(f, bias=f.take("mlp_bias")), norm))
    return read_decoder(f, [block] * f.take("num_hidden_layers"), norm)


def write(config):
    return {**write_decoder(config), **write_attention(config), **write_mlp(config), "rms_norm_eps": config.norm.eps,
            "attention_bias": each(config, Attention)[0].bias, "mlp_bias": each(config, MLP)[0].bias}


FAMILY = Family(("llama",), "LlamaForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
