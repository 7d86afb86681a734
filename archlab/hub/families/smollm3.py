"""SmolLM 3 (Hugging Face 2025): Llama without positions in every fourth layer (arXiv:2501.18795)."""

from archlab.attention.attention import Attention
from archlab.hub.decoders import (BLOCK, OUTER, read_attention, read_decoder, read_mlp, read_sizes, read_windows,
                                  write_attention, write_decoder, write_mlp, write_windows)
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.hub.rope import read_rotary
from archlab.layers.mlp import MLP
from archlab.layers.norms import RMSNorm

DEFAULTS = dict(vocab_size=128256, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                num_attention_heads=16, num_key_value_heads=4, hidden_act="silu",
                max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=False,
                mlp_bias=False, use_sliding_window=False, sliding_window=None, no_rope_layers=None,
                no_rope_layer_interval=4)


def read(f):
    norm, bias = RMSNorm(f.take("rms_norm_eps")), f.take("attention_bias")
    rotary, mlp = read_rotary(f, read_sizes(f)["head_size"], base=2e6), read_mlp(f, bias=f.take("mlp_bias"))
    used, interval = f.take("use_sliding_window"), f.positive("no_rope_layer_interval")
    layers = f.take("num_hidden_layers")
    turned = f.take("no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]  # 1 where rope IS used
    f.take("max_window_layers", None)  # of Qwen; the hub's file has it, and nothing reads it
    if len(turned) < layers:
        f.refuse(f"no_rope_layers = {turned}: must be {layers} numbers, 1 for each layer with positions, 0 for others")
        turned = [1] * layers

    def block(turn, window):
        attention = read_attention(f, positions=rotary if turn else None, window=window, bias=bias, out_bias=bias)
        return sequential(attention, mlp, norm)

    windows = read_windows(f, slides=lambda i: used and not turned[i])
    return read_decoder(f, [block(*pair) for pair in zip(turned, windows)], norm)


def write(config):
    attentions, windows = each(config, Attention), write_windows(config)
    return {**write_decoder(config), **write_attention(config), **write_mlp(config), **windows,
            "use_sliding_window": "sliding_window" in windows,
            "no_rope_layers": [int(a.positions is not None) for a in attentions], "rms_norm_eps": config.norm.eps,
            "attention_bias": attentions[0].bias, "mlp_bias": each(config, MLP)[0].bias}


FAMILY = Family(("smollm3",), "SmolLM3ForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
