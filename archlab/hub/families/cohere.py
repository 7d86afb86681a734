"""Command R (Cohere 2024): attention and MLP side by side on one norm without bias, neighbouring channels turned."""

from archlab.attention.attention import Attention
from archlab.attention.qk_norm import QKNorm
from archlab.hub.decoders import (OUTER, read_attention, read_decoder, read_mlp, read_sizes, write_attention,
                                  write_decoder, write_mlp)
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import PARALLEL, parallel, placed
from archlab.hub.layout import Apart
from archlab.hub.rope import read_rotary
from archlab.layers.norms import LayerNorm

DEFAULTS = dict(vocab_size=256000, hidden_size=8192, intermediate_size=22528, logit_scale=0.0625, num_hidden_layers=40,
                num_attention_heads=64, num_key_value_heads=None, hidden_act="silu", max_position_embeddings=8192,
                layer_norm_eps=1e-5, tie_word_embeddings=True, attention_bias=False, use_qk_norm=False)

BLOCK = placed({"norm1/scale": "input_layernorm.weight",
                "attention/{query,key,value,out}{,_bias}": "self_attn.{q,k,v,o}_proj.{weight,bias}",
                "attention/query_norm/scale": Apart("self_attn.q_norm.weight"),
                "attention/key_norm/scale": Apart("self_attn.k_norm.weight"),
                "mlp/{gate,up,down}": "mlp.{gate,up,down}_proj.weight"}, PARALLEL)


def read(f):
    norm, bias = LayerNorm(f.take("layer_norm_eps"), bias=False), f.take("attention_bias")
    rotary = read_rotary(f, read_sizes(f)["head_size"], base=500000.0, interleaved=True)
    f.take("model_max_length", None)
    qk_norm = QKNorm(norm, per_head=True) if f.take("use_qk_norm") else None
    attention = read_attention(f, positions=rotary, bias=bias, out_bias=bias, qk_norm=qk_norm)
    blocks = [parallel(attention, read_mlp(f), norm)] * f.take("num_hidden_layers")
    return read_decoder(f, blocks, norm, logit_scale=f.positive("logit_scale"))


def write(config):
    attention = each(config, Attention)[0]
    return {**write_decoder(config), **write_attention(config), **write_mlp(config), "layer_norm_eps": config.norm.eps,
            "logit_scale": config.logit_scale, "attention_bias": attention.bias,
            "use_qk_norm": attention.qk_norm is not None}


FAMILY = Family(("cohere",), "CohereForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
