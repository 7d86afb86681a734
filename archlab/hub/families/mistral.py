"""Mistral 7B (arXiv:2310.06825), Nemo and Small: Llama with a window, which Ministral has in some layers only."""

from archlab.attention.attention import Attention
from archlab.hub.decoders import (BLOCK, OUTER, read_attention, read_decoder, read_mlp, read_windows, write_attention,
                                  write_decoder, write_mlp, write_windows)
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.layers.norms import RMSNorm

DEFAULTS = dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8, head_dim=None, hidden_act="silu",
                max_position_embeddings=131072, rms_norm_eps=1e-6, tie_word_embeddings=False, sliding_window=4096)


def read(f):
    norm, mlp = RMSNorm(f.take("rms_norm_eps")), read_mlp(f)
    windows = read_windows(f, slides=lambda i: True)
    return read_decoder(f, [sequential(read_attention(f, window=window), mlp, norm) for window in windows], norm)


def write(config):
    windows = {attention.window for attention in each(config, Attention)}
    if len(windows) == 1:
        windows = {"sliding_window": windows.pop()}
    else:
        windows = {"model_type": "ministral", "architectures": ["MinistralForCausalLM"], **write_windows(config)}
    return {**write_decoder(config), **write_attention(config), **write_mlp(config), **windows,
            "rms_norm_eps": config.norm.eps}


FAMILY = Family(("mistral", "ministral"), "MistralForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
