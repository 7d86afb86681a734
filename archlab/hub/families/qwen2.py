"""Qwen 1.5 to 2.5 (arXiv:2407.10671, arXiv:2412.15115): Llama with biases of queries, keys and values."""

from archlab.hub.decoders import (BLOCK, OUTER, read_attention, read_decoder, read_mlp, read_windows, write_attention,
                                  write_decoder, write_mlp, write_windows)
from archlab.hub.family import Blocks, Family
from archlab.hub.forms import sequential
from archlab.layers.norms import RMSNorm

DEFAULTS = dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=32, hidden_act="silu",
                max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False, use_sliding_window=False,
                max_window_layers=28)


def read(f):
    norm, mlp = RMSNorm(f.take("rms_norm_eps")), read_mlp(f)
    f.only("use_mrope", False, default=False)
    blocks = [sequential(read_attention(f, window=window, bias=True), mlp, norm) for window in read_late_windows(f)]
    return read_decoder(f, blocks, norm)


def read_late_windows(f):
    """The window of each layer: the first `max_window_layers` have none, and none has where it is not used."""
    used, first = f.take("use_sliding_window"), f.take("max_window_layers")
    windows = read_windows(f, slides=lambda i: used and i >= first)
    if any(windows) and not used:
        f.refuse("layer_types has layers that slide, and use_sliding_window is false")
    return windows


def write_late_windows(config):
    windows = write_windows(config)
    return {**windows, "use_sliding_window": "sliding_window" in windows}


def write(config):
    return {**write_decoder(config), **write_attention(config), **write_mlp(config), **write_late_windows(config),
            "rms_norm_eps": config.norm.eps}


FAMILY = Family(("qwen2",), "Qwen2ForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
