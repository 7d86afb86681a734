"""Falcon (arXiv:2311.16867): queries, keys and values in one matrix, group by group of heads, in one of three forms."""

from archlab.attention.attention import Attention
from archlab.attention.positions import ALiBi
from archlab.hub.decoders import ACTIVATIONS, read_decoder, read_sizes, write_activation, write_decoder
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import PARALLEL, SEQUENTIAL, TWO_NORMS, parallel, placed, sequential, two_norms
from archlab.hub.layout import Fused
from archlab.hub.rope import read_rotary, write_rotary
from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm, Normalise
from archlab.layers.sequence import Parallel

DEFAULTS = dict(vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71,
                num_ln_in_parallel_attn=None, layer_norm_epsilon=1e-5, num_kv_heads=None, alibi=False,
                new_decoder_architecture=False, multi_query=True, parallel_attn=True, bias=False,
                max_position_embeddings=2048, ffn_hidden_size=None, activation="gelu", tie_word_embeddings=True)

OUTER = {"embed/table": "transformer.word_embeddings.weight", "norm/{scale,bias}": "transformer.ln_f.{weight,bias}",
         "head/weight": "lm_head.weight"}
PARTS = {"attention/{query,key,value}": Fused("self_attention.query_key_value.weight"),
         "attention/{query,key,value}_bias": Fused("self_attention.query_key_value.bias"),
         "attention/out{,_bias}": "self_attention.dense.{weight,bias}",
         "mlp/up{,_bias}": "mlp.dense_h_to_4h.{weight,bias}", "mlp/down{,_bias}": "mlp.dense_4h_to_h.{weight,bias}"}
NORMS = {"norm1/{scale,bias}": "input_layernorm.{weight,bias}",
         "norm2/{scale,bias}": "post_attention_layernorm.{weight,bias}"}
OWN_NORMS = {"norm1/{scale,bias}": "ln_attn.{weight,bias}", "norm2/{scale,bias}": "ln_mlp.{weight,bias}"}
BLOCK = placed(PARTS | NORMS, SEQUENTIAL, PARALLEL) | placed(PARTS | OWN_NORMS, TWO_NORMS)


def read(f):
    sizes, width, bias = read_sizes(f), f.take("hidden_size"), f.take("bias")
    norm = LayerNorm(f.take("layer_norm_epsilon"))
    heads, size = sizes["heads"], sizes["head_size"]
    f.only("apply_residual_connection_post_layernorm", False, default=False)
    if f.take("new_decoder_architecture"):
        f.only("parallel_attn", True)
        form = parallel if f.only("num_ln_in_parallel_attn", None, 1, 2) == 1 else two_norms
        kv_heads = f.take("num_kv_heads") or heads
        f.take("multi_query")  # which counts only without this architecture
    else:
        form = parallel if f.take("parallel_attn") else sequential
        f.only("num_ln_in_parallel_attn", None, 1)
        kv_heads = 1 if f.take("multi_query") else heads
        if f.take("num_kv_heads") and kv_heads > 1:  # several queries to a key: in the new architecture alone
            f.only("num_kv_heads", kv_heads)
    rotary = read_rotary(f, size)  # transformers 5 writes its fields with ALiBi too
    positions = ALiBi(size**-0.5) if f.take("alibi") else rotary
    attention = Attention(heads, kv_heads, size, positions, bias=bias, out_bias=bias)
    hidden = f.take("ffn_hidden_size") or 4 * width
    f.only("ff_factor", None, hidden / width, default=None)
    mlp = MLP(hidden, f.choose("activation", ACTIVATIONS), bias=bias)
    return read_decoder(f, [form(attention, mlp, norm)] * f.take("num_hidden_layers"), norm)


def write(config):
    attentions, mlp, own_norms = each(config, Attention), each(config, MLP)[0], bool(each(config, Normalise))
    first = attentions[0]
    alibi, kv_heads = isinstance(first.positions, ALiBi), first.kv_heads or first.heads
    rotary = {} if alibi else write_rotary(first.positions, config.width // first.heads)
    new = own_norms or kv_heads not in (1, first.heads)
    return {**write_decoder(config), **rotary, "num_hidden_layers": len(attentions), "num_attention_heads": first.heads,
            "num_kv_heads": kv_heads, "multi_query": kv_heads == 1, "alibi": alibi, "bias": first.bias,
            "new_decoder_architecture": new, "num_ln_in_parallel_attn": 1 + own_norms if new else None,
            "parallel_attn": bool(each(config, Parallel)), "layer_norm_epsilon": config.norm.eps,
            "ffn_hidden_size": mlp.hidden, "activation": write_activation(mlp)}


FAMILY = Family(("falcon",), "FalconForCausalLM", DEFAULTS, read, write, OUTER,
                (Blocks(BLOCK, "transformer.h.{i}."),), base="transformer.")
