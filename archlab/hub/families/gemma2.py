"""Gemma 2 (arXiv:2408.00118): Gemma with norms around the branches, capped scores and logits, and a window in every
other layer."""

from archlab.attention.attention import Attention
from archlab.hub.decoders import (OUTER, SANDWICH, read_attention, read_decoder, read_mlp, read_windows,
                                  write_attention, write_decoder, write_mlp, write_windows)
from archlab.hub.family import Blocks, Family, each
from archlab.layers.norms import RMSNorm
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence

DEFAULTS = dict(vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
                num_attention_heads=8, num_key_value_heads=4, head_dim=256, hidden_activation="gelu_pytorch_tanh",
                max_position_embeddings=8192, rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=False,
                query_pre_attn_scalar=256, sliding_window=4096, final_logit_softcapping=30.0,
                attn_logit_softcapping=50.0, use_bidirectional_attention=None)


def read(f):
    norm, bias = RMSNorm(f.take("rms_norm_eps"), centred=True), f.take("attention_bias")
    f.only("use_bidirectional_attention", None, False)
    f.only("sliding_window_size", None, f.take("sliding_window"), default=None)  # the first files say it twice
    f.take("hidden_act", None)  # and have this from Gemma, which hidden_activation overrules
    attention = read_attention(f, bias=bias, out_bias=bias, scale=f.positive("query_pre_attn_scalar") ** -0.5,
                               cap=f.take("attn_logit_softcapping"))
    mlp = Residual(read_mlp(f, activation="hidden_activation"), norm, norm)
    blocks = [Sequence(Residual(attention.set("window", window), norm, norm), mlp)
              for window in read_windows(f, slides=lambda i: i % 2 == 0)]
    return read_decoder(f, blocks, norm, embedding_scale=f.take("hidden_size") ** 0.5,
                        logit_cap=f.take("final_logit_softcapping"))


def write(config):
    attention = each(config, Attention)[0]
    return {**write_decoder(config), **write_attention(config), **write_windows(config),
            **write_mlp(config, "hidden_activation"), "rms_norm_eps": config.norm.eps,
            "attention_bias": attention.bias, "query_pre_attn_scalar": write_scale(config, attention),
            "attn_logit_softcapping": attention.cap, "final_logit_softcapping": config.logit_cap}


def write_scale(config, attention):
    """The number whose inverse root the scores are multiplied by."""
    if attention.scale is None:
        return attention.head_size or config.width // attention.heads
    number = attention.scale ** -2
    return round(number) if round(number) ** -0.5 == attention.scale else number


FAMILY = Family(("gemma2",), "Gemma2ForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(SANDWICH),))
