"""Gemma 3 (arXiv:2503.19786), its text: Gemma 2 with normed heads for caps, a window in five of six layers, and
positions of their own for these."""

from archlab.attention.attention import Attention
from archlab.attention.qk_norm import QKNorm
from archlab.hub.decoders import (OUTER, SANDWICH, read_attention, read_decoder, read_mlp, read_sizes, read_windows,
                                  write_attention_by_type, write_decoder, write_mlp)
from archlab.hub.families import gemma2
from archlab.hub.family import Blocks, Family, each
from archlab.hub.rope import FULL, SLIDING, read_rotary_by_type
from archlab.layers.norms import RMSNorm
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence

DEFAULTS = gemma2.DEFAULTS | dict(vocab_size=262208, max_position_embeddings=131072, final_logit_softcapping=None,
                                  attn_logit_softcapping=None, use_bidirectional_attention=False)


def read(f):
    norm, bias = RMSNorm(f.take("rms_norm_eps"), centred=True), f.take("attention_bias")
    f.only("use_bidirectional_attention", None, False)
    f.only("attn_logit_softcapping", None)
    f.take("_sliding_window_pattern", None)  # as transformers derived it; layer_types is written beside it
    local, pattern = f.take("rope_local_base_freq", 1e4), f.positive("sliding_window_pattern", 6)
    positions = read_rotary_by_type(f, read_sizes(f)["head_size"], full=1e6, sliding=local)
    scale = f.positive("query_pre_attn_scalar") ** -0.5
    mlp = Residual(read_mlp(f, activation="hidden_activation"), norm, norm)

    def block(window):
        attention = read_attention(f, positions=positions[SLIDING if window else FULL], window=window, bias=bias,
                                   out_bias=bias, qk_norm=QKNorm(norm), scale=scale)
        return Sequence(Residual(attention, norm, norm), mlp)

    blocks = [block(window) for window in read_windows(f, slides=lambda i: (i + 1) % pattern)]
    return read_decoder(f, blocks, norm, embedding_scale=f.take("hidden_size") ** 0.5,
                        logit_cap=f.take("final_logit_softcapping"))


def write(config):
    attention = each(config, Attention)[0]
    return {**write_decoder(config), **write_attention_by_type(config), **write_mlp(config, "hidden_activation"),
            "rms_norm_eps": config.norm.eps, "attention_bias": attention.bias,
            "query_pre_attn_scalar": gemma2.write_scale(config, attention), "final_logit_softcapping": config.logit_cap}


FAMILY = Family(("gemma3_text",), "Gemma3ForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(SANDWICH),))
