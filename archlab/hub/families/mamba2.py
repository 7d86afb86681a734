"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060)."""

import math

from archlab.hub.decoders import read_decoder, write_decoder
from archlab.hub.family import Blocks, Family, each
from archlab.hub.families.mamba import OUTER
from archlab.hub.layout import Depthwise
from archlab.layers.norms import RMSNorm
from archlab.layers.residual import Residual
from archlab.recurrence.mamba2 import Mamba2

INFINITY = {"__float__": "Infinity"}  # as transformers writes it, for JSON has none

DEFAULTS = dict(num_heads=128, head_dim=64, vocab_size=32768, hidden_size=4096, state_size=128, num_hidden_layers=64,
                layer_norm_epsilon=1e-5, expand=2, conv_kernel=4, n_groups=8, use_bias=False, use_conv_bias=True,
                hidden_act="silu", time_step_limit=(0.0, math.inf), tie_word_embeddings=False)

BLOCK = {"before/scale": "norm.weight", "layer/{gate,into,step}": "mixer.in_proj.weight",
         "layer/{gate,into,step}_bias": "mixer.in_proj.bias", "layer/conv/weight": Depthwise("mixer.conv1d.weight"),
         "layer/conv/bias": "mixer.conv1d.bias", "layer/A_log": "mixer.A_log", "layer/skip": "mixer.D",
         "layer/dt_bias": "mixer.dt_bias", "layer/norm/scale": "mixer.norm.weight",
         "layer/out{,_bias}": "mixer.out_proj.{weight,bias}"}


def read(f):
    f.only("hidden_act", "silu", "swish")
    norm, size = RMSNorm(f.take("layer_norm_epsilon")), f.take("head_dim")
    f.only("num_heads", f.take("expand") * f.take("hidden_size") // size)
    f.take("time_step_rank", None)  # written, and without use
    limits = tuple(math.inf if step == INFINITY else float(step) for step in f.take("time_step_limit"))
    limits = None if limits == (0.0, math.inf) else limits
    mixer = Mamba2(f.take("state_size"), size, f.take("n_groups"), f.take("conv_kernel"), f.take("expand"), limits,
                   f.take("use_bias"), f.take("use_conv_bias"), norm.eps)
    return read_decoder(f, [Residual(mixer, norm)] * f.take("num_hidden_layers"), norm)


def write(config):
    mixers = each(config, Mamba2)
    mixer = mixers[0]
    return {**write_decoder(config), "num_hidden_layers": len(mixers), "layer_norm_epsilon": config.norm.eps,
            "num_heads": mixer.expand * config.width // mixer.head_size, "head_dim": mixer.head_size,
            "state_size": mixer.state, "n_groups": mixer.groups, "conv_kernel": mixer.conv, "expand": mixer.expand,
            "use_bias": mixer.bias, "use_conv_bias": mixer.conv_bias,
            **({"time_step_limit": [INFINITY if step == math.inf else step for step in mixer.step_limits]}
               if mixer.step_limits else {})}


FAMILY = Family(("mamba2",), "Mamba2ForCausalLM", DEFAULTS, read, write, OUTER,
                (Blocks(BLOCK, "backbone.layers.{i}."),), base="backbone.")
