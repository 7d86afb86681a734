"""Qwen 1.5 MoE and the mixture of Qwen 2 (arXiv:2407.10671, section 2.2.2): small experts, beside a gated one that all
tokens share; some layers may have an MLP instead."""

from archlab.attention.attention import Attention
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.hub.decoders import (ATTENTION, MLP_NAMES, OUTER, PRE_NORMS, read_attention, read_decoder, read_mlp,
                                  read_windows, write_attention, write_decoder)
from archlab.hub.experts import experts_at, feed_forwards, read_moe, write_moe
from archlab.hub.families.qwen2 import write_late_windows
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.layers.mlp import MLP
from archlab.layers.norms import RMSNorm
from archlab.layers.sequence import Gated, Parallel

DEFAULTS = dict(vocab_size=151936, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
                num_attention_heads=16, num_key_value_heads=16, hidden_act="silu", max_position_embeddings=32768,
                rms_norm_eps=1e-6, tie_word_embeddings=False, use_sliding_window=False, max_window_layers=28,
                decoder_sparse_step=1, moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
                num_experts_per_tok=4, num_experts=60, norm_topk_prob=False, router_aux_loss_coef=0.001,
                mlp_only_layers=[], qkv_bias=True)

SHARED = {"layers/1/layer/layers/1/layer/{gate,up,down}": "mlp.shared_expert.{gate,up,down}_proj.weight",
          "layers/1/layer/layers/1/weight": "mlp.shared_expert_gate.weight"}
BLOCK = ATTENTION | PRE_NORMS | MLP_NAMES | experts_at("layers/1/layer/layers/0", "mlp") | SHARED


def read(f):
    norm, bias, experts = RMSNorm(f.take("rms_norm_eps")), f.take("qkv_bias"), read_experts(f, "num_experts")
    shared = MLP(f.positive("shared_expert_intermediate_size"), experts.activation, gated=True)
    layers = zip(read_even_windows(f), read_mixed(f, Parallel(experts, Gated(shared))), strict=True)
    return read_decoder(f, [sequential(read_attention(f, window=window, bias=bias), layer, norm)
                            for window, layer in layers], norm)


def read_even_windows(f):
    """The window of each layer: where it is used, every second of the first `max_window_layers` has one."""
    used, end = f.take("use_sliding_window"), f.take("max_window_layers")
    windows = read_windows(f, slides=lambda i: used and i < end and i % 2 == 0)
    if any(windows) and not used:
        f.refuse("layer_types has layers that slide, and use_sliding_window is false")
    return windows


def read_experts(f, experts):
    """experts: the name of the field that says how many."""
    router = TopK(f.take("num_experts_per_tok"), renormalise=f.take("norm_topk_prob"))
    return read_moe(f, experts, "moe_intermediate_size", router)


def read_mixed(f, sparse):
    """What follows attention in each layer: `sparse`, or an MLP in those that are left out."""
    step, dense, mlp = f.positive("decoder_sparse_step"), f.take("mlp_only_layers") or [], read_mlp(f)
    return [mlp if i in dense or (i + 1) % step else sparse for i in range(f.take("num_hidden_layers"))]


def write_mixed(config, experts):
    """The inverse of `read_experts` and `read_mixed`."""
    dense = {i: layer for i, layer in enumerate(feed_forwards(config)) if isinstance(layer, MLP)}
    return {**write_moe(config, experts, "moe_intermediate_size"), "mlp_only_layers": list(dense),
            "norm_topk_prob": each(config, MoE)[0].router.renormalise,
            **{"intermediate_size": layer.hidden for layer in dense.values()}}


def write(config):
    return {**write_decoder(config), **write_attention(config), **write_late_windows(config),
            **write_mixed(config, "num_experts"), "rms_norm_eps": config.norm.eps,
            "qkv_bias": each(config, Attention)[0].bias,
            "shared_expert_intermediate_size": each(config, Gated)[0].layer.hidden}


FAMILY = Family(("qwen2_moe",), "Qwen2MoeForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
