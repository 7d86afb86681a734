"""Command R7B and Command A (arXiv:2504.00698): of four layers three see a window and know places."""

from archlab.attention.attention import Attention
from archlab.hub.decoders import (OUTER, read_attention, read_decoder, read_mlp, read_windows,
                                  write_attention, write_decoder, write_mlp, write_windows)
from archlab.hub.families import cohere
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import parallel
from archlab.hub.rope import read_rotary
from archlab.layers.norms import LayerNorm

DEFAULTS = {name: value for name, value in cohere.DEFAULTS.items() if name != "use_qk_norm"} | dict(
    sliding_window=4096)
FIXED = dict(use_qk_norm=False, rotary_pct=1.0, position_embedding_type="rope_gptj", use_gated_activation=True,
             use_parallel_block=True, order_of_interleaved_layers="local_attn_first", use_embedding_sharing=True)


def read(f):
    size = f.take("hidden_size") // f.positive("num_attention_heads")
    f.only("head_dim", size, default=size)  # whatever is written, it is this
    for name, value in FIXED.items():  # written in files, and taken for granted
        f.only(name, value, default=value)
    f.take("use_parallel_embedding", None)  # across devices
    norm, bias = LayerNorm(f.take("layer_norm_eps"), bias=False), f.take("attention_bias")
    if "layer_types" not in f and not f.take("sliding_window"):
        f.refuse("sliding_window = null is not supported; a number of places is")
    pattern = f.positive("sliding_window_pattern", 4)
    f.only("layer_switch", pattern, default=pattern)
    rotary = read_rotary(f, size, base=500000.0, interleaved=True)
    mlp = read_mlp(f)
    blocks = [parallel(read_attention(f, positions=rotary if window else None, window=window, bias=bias, out_bias=bias),
                       mlp, norm) for window in read_windows(f, lambda i: (i + 1) % pattern > 0)]
    return read_decoder(f, blocks, norm, logit_scale=f.positive("logit_scale"))


def write(config):
    return {**write_decoder(config), **write_attention(config), **write_windows(config), **write_mlp(config),
            "layer_norm_eps": config.norm.eps, "logit_scale": config.logit_scale,
            "attention_bias": each(config, Attention)[0].bias}


FAMILY = Family(("cohere2",), "Cohere2ForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(cohere.BLOCK),))
