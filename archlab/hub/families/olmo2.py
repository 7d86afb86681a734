"""OLMo 2 (arXiv:2501.00656): norms after the branches and not before them, queries and keys normed over all heads."""

from archlab.attention.attention import Attention
from archlab.attention.qk_norm import QKNorm
from archlab.hub.decoders import (OUTER, SANDWICH, read_attention, read_decoder, read_mlp, write_attention,
                                  write_decoder, write_mlp)
from archlab.hub.family import Blocks, Family, each
from archlab.layers.norms import RMSNorm
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence

DEFAULTS = dict(vocab_size=50304, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=None, hidden_act="silu",
                max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=False)


def read(f):
    norm, bias = RMSNorm(f.take("rms_norm_eps")), f.take("attention_bias")
    attention = read_attention(f, qk_norm=QKNorm(norm, over="all"), bias=bias, out_bias=bias)
    block = Sequence(Residual(attention, before=None, after=norm), Residual(read_mlp(f), before=None, after=norm))
    return read_decoder(f, [block] * f.take("num_hidden_layers"), norm)


def write(config):
    return {**write_decoder(config), **write_attention(config), **write_mlp(config), "rms_norm_eps": config.norm.eps,
            "attention_bias": each(config, Attention)[0].bias}


FAMILY = Family(("olmo2",), "Olmo2ForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(SANDWICH),))
