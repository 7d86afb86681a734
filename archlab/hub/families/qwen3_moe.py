"""The mixtures of Qwen 3 (arXiv:2505.09388): normed heads, small experts, none of them shared."""

from archlab.attention.attention import Attention
from archlab.attention.qk_norm import QKNorm
from archlab.hub.decoders import BLOCK, OUTER, read_attention, read_decoder, write_attention, write_decoder
from archlab.hub.experts import experts_at
from archlab.hub.families.qwen2_moe import read_experts, read_mixed, write_mixed
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.layers.norms import RMSNorm

DEFAULTS = dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24,
                num_attention_heads=32, num_key_value_heads=4, head_dim=None, hidden_act="silu",
                max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False,
                use_sliding_window=False, decoder_sparse_step=1, moe_intermediate_size=768, num_experts_per_tok=8,
                num_local_experts=128, norm_topk_prob=False, router_aux_loss_coef=0.001, mlp_only_layers=[])


def read(f):
    norm, bias, window = RMSNorm(f.take("rms_norm_eps")), f.take("attention_bias"), f.whole("sliding_window", 4096)
    f.take("max_window_layers", None)  # is not looked at: all layers have the window, or none
    attention = read_attention(f, qk_norm=QKNorm(norm), bias=bias, out_bias=bias,
                               window=window if f.take("use_sliding_window") else None)
    layers = read_mixed(f, read_experts(f, "num_local_experts"))
    return read_decoder(f, [sequential(attention, layer, norm) for layer in layers], norm)


def write(config):
    attention = each(config, Attention)[0]
    return {**write_decoder(config), **write_attention(config), **write_mixed(config, "num_local_experts"),
            "rms_norm_eps": config.norm.eps, "attention_bias": attention.bias, "sliding_window": attention.window,
            "use_sliding_window": attention.window is not None}


FAMILY = Family(("qwen3_moe",), "Qwen3MoeForCausalLM", DEFAULTS, read, write, OUTER,
                (Blocks(experts_at("layers/1/layer", "mlp") | BLOCK),), spelling={"num_local_experts": "num_experts"})
