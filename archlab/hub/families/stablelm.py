"""StableLM 3B and 2 (arXiv:2402.17834): Llama with LayerNorm, a quarter of each head turned; the 12B side by side."""

from archlab.attention.attention import Attention
from archlab.attention.qk_norm import QKNorm
from archlab.hub.decoders import (OUTER, read_attention, read_decoder, read_mlp, write_attention,
                                  write_decoder, write_mlp)
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import PARALLEL, SEQUENTIAL, parallel, placed, sequential
from archlab.hub.rope import read_rotary
from archlab.layers.norms import LayerNorm
from archlab.layers.sequence import Parallel

DEFAULTS = dict(vocab_size=50304, hidden_size=2560, intermediate_size=6912, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=32, hidden_act="silu", max_position_embeddings=4096,
                layer_norm_eps=1e-5, tie_word_embeddings=False, use_qkv_bias=False, qk_layernorm=False,
                use_parallel_residual=False)

BLOCK = placed({"norm1/{scale,bias}": "input_layernorm.{weight,bias}",
                "norm2/{scale,bias}": "post_attention_layernorm.{weight,bias}",
                "attention/{query,key,value,out}{,_bias}": "self_attn.{q,k,v,o}_proj.{weight,bias}",
                "attention/query_norm/scale": "self_attn.q_layernorm.norms.{h}.weight",
                "attention/key_norm/scale": "self_attn.k_layernorm.norms.{g}.weight",
                "mlp/{gate,up,down}": "mlp.{gate,up,down}_proj.weight"}, SEQUENTIAL, PARALLEL)


def read(f):
    size = f.take("hidden_size") // f.positive("num_attention_heads")
    f.only("head_dim", size, default=size)  # whatever is written, it is this
    eps = f.take("layer_norm_eps")
    qk_norm = QKNorm(LayerNorm(eps, bias=False), per_head=True) if f.take("qk_layernorm") else None
    attention = read_attention(f, positions=read_rotary(f, size, share=0.25),
                               bias=f.take("use_qkv_bias"), qk_norm=qk_norm)
    form = parallel if f.take("use_parallel_residual") else sequential
    block = form(attention, read_mlp(f), LayerNorm(eps))
    return read_decoder(f, [block] * f.take("num_hidden_layers"), LayerNorm(eps))


def write(config):
    attention = each(config, Attention)[0]
    return {**write_decoder(config), **write_attention(config, partial=True), **write_mlp(config),
            "layer_norm_eps": config.norm.eps, "use_qkv_bias": attention.bias,
            "qk_layernorm": attention.qk_norm is not None, "use_parallel_residual": bool(each(config, Parallel))}


FAMILY = Family(("stablelm",), "StableLmForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
