"""BLOOM (arXiv:2211.05100): ALiBi, a norm of the embedded text, biases everywhere."""

from archlab.attention.attention import Attention
from archlab.attention.positions import ALiBi
from archlab.hub.decoders import read_decoder, read_sizes, write_decoder
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import SEQUENTIAL, placed, sequential
from archlab.hub.layout import Fused
from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm, Normalise
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence

DEFAULTS = dict(vocab_size=250880, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, layer_norm_epsilon=1e-5,
                apply_residual_connection_post_layernorm=False, tie_word_embeddings=True)
SPELLING = dict(hidden_size="n_embed", num_hidden_layers="n_layer", num_attention_heads="n_head")
TRAINING = ("bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv",
            "slow_but_exact", "unk_token_id")

OUTER = {"embed/table": "transformer.word_embeddings.weight",
         "body/layers/0/norm/{scale,bias}": "transformer.word_embeddings_layernorm.{weight,bias}",
         "norm/{scale,bias}": "transformer.ln_f.{weight,bias}", "head/weight": "lm_head.weight"}
NORMED = {"norm1": "layers/0/norm", "attention": "layers/1/layer", "norm2": "layers/2/norm", "mlp": "layers/3/layer"}
BLOCK = placed({"norm1/{scale,bias}": "input_layernorm.{weight,bias}",
                "norm2/{scale,bias}": "post_attention_layernorm.{weight,bias}",
                "attention/{query,key,value}": Fused("self_attention.query_key_value.weight"),
                "attention/{query,key,value}_bias": Fused("self_attention.query_key_value.bias"),
                "attention/out{,_bias}": "self_attention.dense.{weight,bias}",
                "mlp/up{,_bias}": "mlp.dense_h_to_4h.{weight,bias}",
                "mlp/down{,_bias}": "mlp.dense_4h_to_h.{weight,bias}"}, SEQUENTIAL, NORMED)


def normed(attention, mlp, norm):
    """The residual stream is what the norms give: `NORMED`."""
    return Sequence(*(part for layer in (attention, mlp) for part in (Normalise(norm), Residual(layer, before=None))))


def read(f):
    norm, width = LayerNorm(f.take("layer_norm_epsilon")), f.take("hidden_size")
    f.only("n_inner", None, 4 * width, default=None)
    for name in TRAINING:
        f.take(name, None)
    form = normed if f.take("apply_residual_connection_post_layernorm") else sequential
    attention = Attention(**read_sizes(f), positions=ALiBi(), bias=True, out_bias=True)
    block = form(attention, MLP(4 * width, "gelu_tanh", bias=True), norm)
    return read_decoder(f, [block] * f.take("num_hidden_layers"), norm, before=(Normalise(norm),))


def write(config):
    attentions = each(config, Attention)
    return {**write_decoder(config), "num_hidden_layers": len(attentions), "num_attention_heads": attentions[0].heads,
            "layer_norm_epsilon": config.norm.eps,
            "apply_residual_connection_post_layernorm": len(each(config, Normalise)) > 1}


FAMILY = Family(("bloom",), "BloomForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK, "transformer.h.{i}."),),
                spelling=SPELLING, base="transformer.")
