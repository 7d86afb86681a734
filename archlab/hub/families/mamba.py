"""Mamba (Gu & Dao 2023, arXiv:2312.00752)."""

from archlab.hub.decoders import read_decoder, write_decoder
from archlab.hub.family import Blocks, Family, each
from archlab.hub.layout import Apart, Depthwise
from archlab.layers.norms import RMSNorm
from archlab.layers.residual import Residual
from archlab.recurrence.mamba import Mamba

DEFAULTS = dict(vocab_size=50280, hidden_size=768, state_size=16, num_hidden_layers=32, layer_norm_epsilon=1e-5,
                expand=2, conv_kernel=4, use_bias=False, use_conv_bias=True, hidden_act="silu",
                tie_word_embeddings=True)

OUTER = {"embed/table": "backbone.embeddings.weight", "norm/scale": "backbone.norm_f.weight",
         "head/weight": "lm_head.weight"}
BLOCK = {"before/scale": "norm.weight", "layer/{into,gate}": "mixer.in_proj.weight",
         "layer/{into,gate}_bias": "mixer.in_proj.bias", "layer/conv/weight": Depthwise("mixer.conv1d.weight"),
         "layer/conv/bias": "mixer.conv1d.bias", "layer/select": "mixer.x_proj.weight",
         "layer/step{,_bias}": "mixer.dt_proj.{weight,bias}", "layer/A_log": Apart("mixer.A_log"),
         "layer/skip": "mixer.D", "layer/out{,_bias}": "mixer.out_proj.{weight,bias}"}


def read(f, inner_norm: RMSNorm | None = None):
    f.only("hidden_act", "silu", "swish")
    f.only("intermediate_size", None, f.take("expand") * f.take("hidden_size"), default=None)
    norm, rank = RMSNorm(f.take("layer_norm_epsilon")), f.take("time_step_rank", "auto")
    mixer = Mamba(f.take("state_size"), f.take("conv_kernel"), f.take("expand"), None if rank == "auto" else rank,
                  inner_norm, f.take("use_bias"), f.take("use_conv_bias"))
    return read_decoder(f, [Residual(mixer, norm)] * f.take("num_hidden_layers"), norm)


def write(config):
    mixers = each(config, Mamba)
    mixer = mixers[0]
    return {**write_decoder(config), "num_hidden_layers": len(mixers), "layer_norm_epsilon": config.norm.eps,
            "state_size": mixer.state, "conv_kernel": mixer.conv, "expand": mixer.expand,
            "intermediate_size": mixer.expand * config.width, "time_step_rank": mixer.rank(config.width),
            "use_bias": mixer.bias, "use_conv_bias": mixer.conv_bias}


FAMILY = Family(("mamba",), "MambaForCausalLM", DEFAULTS, read, write, OUTER,
                (Blocks(BLOCK, "backbone.layers.{i}."),), base="backbone.")
