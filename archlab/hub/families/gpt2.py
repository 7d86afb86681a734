"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU, and matrices stored as [inputs, outputs]."""

from archlab.attention.attention import Attention
from archlab.hub.decoders import ACTIVATIONS, read_decoder, read_sizes, write_activation, write_decoder
from archlab.hub.family import Blocks, Family, each
from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm
from archlab.layers.positions import LearnedPositions
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence

DEFAULTS = dict(vocab_size=50257, n_positions=1024, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                n_inner=None, activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
                scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)
SPELLING = dict(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head")

OUTER = {"embed/table": "transformer.wte.weight", "body/layers/0/table": "transformer.wpe.weight",
         "norm/{scale,bias}": "transformer.ln_f.{weight,bias}", "head/weight": "lm_head.weight"}
BLOCK = {"layers/0/before/{scale,bias}": "ln_1.{weight,bias}",
         "layers/0/layer/{query,key,value}": "attn.c_attn.weight",
         "layers/0/layer/{query,key,value}_bias": "attn.c_attn.bias",
         "layers/0/layer/out{,_bias}": "attn.c_proj.{weight,bias}",
         "layers/1/before/{scale,bias}": "ln_2.{weight,bias}",
         "layers/1/layer/up{,_bias}": "mlp.c_fc.{weight,bias}",
         "layers/1/layer/down{,_bias}": "mlp.c_proj.{weight,bias}"}


def read(f):
    norm, sizes = LayerNorm(f.take("layer_norm_epsilon")), read_sizes(f)
    scale = sizes["head_size"] ** -0.5 if f.take("scale_attn_weights") else 1.0
    by_layer = f.take("scale_attn_by_inverse_layer_idx")
    hidden = f.take("n_inner") or 4 * f.take("hidden_size")
    mlp = MLP(hidden, f.choose("activation_function", ACTIVATIONS), bias=True)

    def block(i):
        own = scale / (i + 1) if by_layer else scale
        attention = Attention(**sizes, positions=None, bias=True, out_bias=True, scale=own)
        return Sequence(Residual(attention, norm), Residual(mlp, norm))

    blocks = [block(i) for i in range(f.take("num_hidden_layers"))]
    return read_decoder(f, blocks, norm, before=(LearnedPositions(f.take("n_positions")),))


def write(config):
    attentions, mlp = each(config, Attention), each(config, MLP)[0]
    scales = [attention.scale for attention in attentions]
    return {**write_decoder(config), "num_hidden_layers": len(attentions), "num_attention_heads": attentions[0].heads,
            "n_positions": each(config, LearnedPositions)[0].length, "n_inner": mlp.hidden,
            "activation_function": write_activation(mlp), "layer_norm_epsilon": config.norm.eps,
            "scale_attn_weights": scales[0] != 1.0, "scale_attn_by_inverse_layer_idx": len(set(scales)) > 1}


FAMILY = Family(("gpt2",), "GPT2LMHeadModel", DEFAULTS, read, write, OUTER,
                (Blocks(BLOCK, "transformer.h.{i}.", inputs_first=True),), spelling=SPELLING, base="transformer.",
                buffers=("*.h.*.attn.bias",))
