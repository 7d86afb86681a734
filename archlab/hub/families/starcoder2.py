"""StarCoder 2 (arXiv:2402.19173): Llama with LayerNorm, biases and a plain MLP, all of it within a window."""

from archlab.attention.attention import Attention
from archlab.hub.decoders import (ATTENTION, OUTER, PRE_NORMS, read_attention, read_decoder, read_mlp, write_attention,
                                  write_decoder, write_mlp)
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.layers.norms import LayerNorm

DEFAULTS = dict(vocab_size=49152, hidden_size=3072, intermediate_size=12288, num_hidden_layers=30,
                num_attention_heads=24, num_key_value_heads=2, hidden_act="gelu_pytorch_tanh",
                max_position_embeddings=4096, norm_epsilon=1e-5, sliding_window=None, use_bias=True,
                tie_word_embeddings=True)
FIXED = dict(mlp_type="default", norm_type="layer_norm", scale_attn_weights=True)

BLOCK = ATTENTION | PRE_NORMS | {"layers/1/layer/{up,down}{,_bias}": "mlp.c_{fc,proj}.{weight,bias}"}


def read(f):
    for name, value in FIXED.items():  # written in files, and taken for granted
        f.only(name, value, default=value)
    for name in ("activation_function", "layer_norm_epsilon"):  # hidden_act and norm_epsilon are what counts
        f.take(name, None)
    norm, bias = LayerNorm(f.take("norm_epsilon")), f.take("use_bias")
    attention = read_attention(f, window=f.take("sliding_window"), bias=bias, out_bias=bias)
    block = sequential(attention, read_mlp(f, gated=False, bias=bias), norm)
    return read_decoder(f, [block] * f.take("num_hidden_layers"), norm)


def write(config):
    attention = each(config, Attention)[0]
    return {**write_decoder(config), **write_attention(config), **write_mlp(config), "norm_epsilon": config.norm.eps,
            "use_bias": attention.bias, "sliding_window": attention.window}


FAMILY = Family(("starcoder2",), "Starcoder2ForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
