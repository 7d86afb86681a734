"""Granite 3 (IBM 2024): Llama with four multipliers, as maximal update parametrisation (arXiv:2203.03466) has them."""

from archlab.attention.attention import Attention
from archlab.hub.decoders import (BLOCK, OUTER, read_attention, read_decoder, read_mlp, write_attention, write_decoder,
                                  write_mlp)
from archlab.hub.family import Blocks, Family, each
from archlab.layers.mlp import MLP
from archlab.layers.norms import RMSNorm
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence

DEFAULTS = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=None, hidden_act="silu",
                max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False,
                mlp_bias=False, embedding_multiplier=1.0, logits_scaling=1.0, residual_multiplier=1.0,
                attention_multiplier=1.0)


def read(f):
    norm, bias, scale = RMSNorm(f.take("rms_norm_eps")), f.take("attention_bias"), f.take("residual_multiplier")
    attention = read_attention(f, bias=bias, out_bias=bias, scale=f.take("attention_multiplier"))
    block = Sequence(Residual(attention, norm, scale=scale),
                     Residual(read_mlp(f, bias=f.take("mlp_bias")), norm, scale=scale))
    return read_decoder(f, [block] * f.take("num_hidden_layers"), norm, logit_scale=1 / f.positive("logits_scaling"),
                        embedding_scale=f.take("embedding_multiplier"))


def write(config):
    attention, sizes = each(config, Attention)[0], write_attention(config)
    return {**write_decoder(config), **sizes, **write_mlp(config), "rms_norm_eps": config.norm.eps,
            "attention_bias": attention.bias, "mlp_bias": each(config, MLP)[0].bias,
            "attention_multiplier": attention.scale or sizes["head_dim"] ** -0.5,
            "residual_multiplier": each(config, Residual)[0].scale, "embedding_multiplier": config.embedding_scale,
            "logits_scaling": 1 / config.logit_scale}


FAMILY = Family(("granite",), "GraniteForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
