"""OLMo 3 (arXiv:2512.13961): OLMo 2 with a window in three of four layers, and positions stretched in the others."""

from archlab.attention.attention import Attention
from archlab.attention.qk_norm import QKNorm
from archlab.hub.decoders import (OUTER, SANDWICH, read_attention, read_decoder, read_mlp, read_sizes, read_windows,
                                  write_attention_by_type, write_decoder, write_mlp)
from archlab.hub.families import olmo2
from archlab.hub.family import Blocks, Family, each
from archlab.hub.rope import FULL, SLIDING, read_rotary_by_type
from archlab.layers.norms import RMSNorm
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence

DEFAULTS = olmo2.DEFAULTS | dict(sliding_window=4096)


def read(f):
    norm, bias, mlp = RMSNorm(f.take("rms_norm_eps")), f.take("attention_bias"), read_mlp(f)
    positions = read_rotary_by_type(f, read_sizes(f)["head_size"], full=500000.0, sliding=500000.0)

    def block(window):
        attention = read_attention(f, positions=positions[SLIDING if window else FULL], window=window,
                                   qk_norm=QKNorm(norm, over="all"), bias=bias, out_bias=bias)
        return Sequence(Residual(attention, before=None, after=norm), Residual(mlp, before=None, after=norm))

    return read_decoder(f, [block(window) for window in read_windows(f, slides=lambda i: (i + 1) % 4)], norm)


def write(config):
    attentions = each(config, Attention)
    if not any(attention.window for attention in attentions):
        raise ValueError("without windows it is OLMo 2")
    return {**write_decoder(config), **write_attention_by_type(config), **write_mlp(config),
            "rms_norm_eps": config.norm.eps, "attention_bias": attentions[0].bias}


FAMILY = Family(("olmo3",), "Olmo3ForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(SANDWICH),))
