"""GPT-NeoX (arXiv:2204.06745) and Pythia (arXiv:2304.01373): attention and MLP side by side, each with its own norm."""

from archlab.attention.attention import Attention
from archlab.hub.decoders import (read_attention, read_decoder, read_mlp, read_sizes, write_attention, write_decoder,
                                  write_mlp)
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import SEQUENTIAL, TWO_NORMS, placed, sequential, two_norms
from archlab.hub.layout import Fused
from archlab.hub.rope import read_rotary
from archlab.layers.norms import LayerNorm
from archlab.layers.sequence import Parallel

DEFAULTS = dict(vocab_size=50432, hidden_size=6144, num_hidden_layers=44, num_attention_heads=64,
                intermediate_size=24576, hidden_act="gelu", max_position_embeddings=2048, layer_norm_eps=1e-5,
                tie_word_embeddings=False, use_parallel_residual=True, attention_bias=True)
SPELLING = dict(rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct")

OUTER = {"embed/table": "gpt_neox.embed_in.weight", "norm/{scale,bias}": "gpt_neox.final_layer_norm.{weight,bias}",
         "head/weight": "embed_out.weight"}
BLOCK = placed({"norm1/{scale,bias}": "input_layernorm.{weight,bias}",
                "norm2/{scale,bias}": "post_attention_layernorm.{weight,bias}",
                "attention/{query,key,value}": Fused("attention.query_key_value.weight"),
                "attention/{query,key,value}_bias": Fused("attention.query_key_value.bias"),
                "attention/out{,_bias}": "attention.dense.{weight,bias}",
                "mlp/up{,_bias}": "mlp.dense_h_to_4h.{weight,bias}",
                "mlp/down{,_bias}": "mlp.dense_4h_to_h.{weight,bias}"}, SEQUENTIAL, TWO_NORMS)


def read(f):
    norm, bias = LayerNorm(f.take("layer_norm_eps")), f.take("attention_bias")
    sizes = read_sizes(f)
    for name, value in (("num_key_value_heads", sizes["heads"]), ("head_dim", f.take("hidden_size") // sizes["heads"])):
        f.only(name, value, default=value)
    rotary = read_rotary(f, sizes["head_size"], share=0.25)
    form = two_norms if f.take("use_parallel_residual") else sequential
    attention = read_attention(f, positions=rotary, bias=bias, out_bias=bias)
    block = form(attention, read_mlp(f, gated=False, bias=True), norm)
    return read_decoder(f, [block] * f.take("num_hidden_layers"), norm)


def write(config):
    return {**write_decoder(config), **write_attention(config, partial=True), **write_mlp(config),
            "layer_norm_eps": config.norm.eps, "attention_bias": each(config, Attention)[0].bias,
            "use_parallel_residual": bool(each(config, Parallel))}


FAMILY = Family(("gpt_neox",), "GPTNeoXForCausalLM", DEFAULTS, read, write, OUTER,
                (Blocks(BLOCK, "gpt_neox.layers.{i}."),), spelling=SPELLING, base="gpt_neox.",
                buffers=("*.attention.bias",))
