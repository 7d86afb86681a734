"""gpt-oss (arXiv:2508.10925): attention with sinks, through a window in every other layer; experts with biases and a
clipped activation, published in MXFP4 (`hub/mxfp4.py`)."""

from archlab.attention.attention import Attention
from archlab.attention.scaling import YaRN
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.hub.decoders import (ATTENTION, OUTER, PRE_NORMS, read_attention, read_decoder, read_sizes, read_windows,
                                  write_attention, write_decoder, write_windows)
from archlab.hub.experts import read_moe, write_moe
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.hub.layout import InputsFirst, Interleaved
from archlab.hub.rope import read_rotary
from archlab.layers.mlp import ClippedSwiGLU
from archlab.layers.norms import RMSNorm

DEFAULTS = dict(vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=36,
                num_attention_heads=64, num_key_value_heads=8, head_dim=64, hidden_act="silu",
                max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False, sliding_window=128,
                num_local_experts=128, num_experts_per_tok=4, swiglu_limit=7.0, swiglu_alpha=1.702,
                router_aux_loss_coef=0.001, attention_bias=True)
BASE, STRETCHED = 150000.0, YaRN(32.0, 4096, truncate=False)  # where nothing is written about positions

BLOCK = ATTENTION | PRE_NORMS | {
    "layers/0/layer/sinks": "self_attn.sinks",
    "layers/1/layer/router/{weight,bias}": "mlp.router.{weight,bias}",
    "layers/1/layer/{gate,up}": Interleaved("mlp.experts.gate_up_proj"),
    "layers/1/layer/{gate,up}_bias": Interleaved("mlp.experts.gate_up_proj_bias"),
    "layers/1/layer/down": InputsFirst("mlp.experts.down_proj"),
    "layers/1/layer/down_bias": "mlp.experts.down_proj_bias"}


def read(f):
    norm, bias, k = RMSNorm(f.take("rms_norm_eps")), f.take("attention_bias"), f.take("num_experts_per_tok")
    f.only("hidden_act", "silu")
    f.only("experts_per_token", k, default=k)
    f.take("initial_context_length", None)  # what rope_scaling says too
    if "quantization_config" in f:  # the tensors say it, too, and are read as what they are
        f.inside("quantization_config").only("quant_method", "mxfp4")
        f.inside("quantization_config").take("modules_to_not_convert", None)
    experts = read_moe(f, "num_local_experts", "intermediate_size", TopK(k, renormalise=True, bias=True), bias=True,
                       activation=ClippedSwiGLU(f.take("swiglu_limit"), f.take("swiglu_alpha")))
    said = "rope_parameters" in f or "rope_scaling" in f
    rotary = read_rotary(f, read_sizes(f)["head_size"], base=BASE)
    rotary = rotary if said else rotary.set("scaling", STRETCHED)

    def block(window):
        attention = read_attention(f, positions=rotary, window=window, bias=bias, out_bias=bias, sinks=True)
        return sequential(attention, experts, norm)

    return read_decoder(f, [block(window) for window in read_windows(f, slides=lambda i: i % 2 == 0)], norm)


def write(config):
    activation = each(config, MoE)[0].activation
    return {**write_decoder(config), **write_attention(config), **write_windows(config),
            **write_moe(config, "num_local_experts", "intermediate_size"), "hidden_act": "silu",
            "swiglu_limit": activation.limit, "swiglu_alpha": activation.alpha,
            "attention_bias": each(config, Attention)[0].bias, "rms_norm_eps": config.norm.eps}


FAMILY = Family(("gpt_oss",), "GptOssForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
