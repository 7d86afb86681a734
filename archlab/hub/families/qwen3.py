"""Qwen 3 (arXiv:2505.09388): Llama with normed heads."""

from archlab.attention.attention import Attention
from archlab.attention.qk_norm import QKNorm
from archlab.hub.decoders import (BLOCK, OUTER, read_attention, read_decoder, read_mlp, write_attention, write_decoder,
                                  write_mlp)
from archlab.hub.families.qwen2 import read_late_windows, write_late_windows
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.layers.norms import RMSNorm

DEFAULTS = dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=32, head_dim=128, hidden_act="silu",
                max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False,
                use_sliding_window=False, max_window_layers=28)


def read(f):
    norm, mlp, bias = RMSNorm(f.take("rms_norm_eps")), read_mlp(f), f.take("attention_bias")
    attention = read_attention(f, qk_norm=QKNorm(norm), bias=bias, out_bias=bias)
    blocks = [sequential(attention.set("window", window), mlp, norm) for window in read_late_windows(f)]
    return read_decoder(f, blocks, norm)


def write(config):
    return {**write_decoder(config), **write_attention(config), **write_mlp(config), **write_late_windows(config),
            "rms_norm_eps": config.norm.eps, "attention_bias": each(config, Attention)[0].bias}


FAMILY = Family(("qwen3",), "Qwen3ForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
