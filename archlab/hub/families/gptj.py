"""GPT-J (Wang & Komatsuzaki 2021): attention and MLP side by side on one norm, neighbouring channels turned."""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.hub.decoders import ACTIVATIONS, read_decoder, read_sizes, write_activation, write_decoder
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import PARALLEL, parallel, placed
from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm

DEFAULTS = dict(vocab_size=50400, hidden_size=4096, num_hidden_layers=28, num_attention_heads=16, rotary_dim=64,
                n_inner=None, activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=False)
SPELLING = dict(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
                max_position_embeddings="n_positions")

OUTER = {"embed/table": "transformer.wte.weight", "norm/{scale,bias}": "transformer.ln_f.{weight,bias}",
         "head/weight": "lm_head.weight", "head_bias": "lm_head.bias"}
BLOCK = placed({"norm1/{scale,bias}": "ln_1.{weight,bias}",
                "attention/{query,key,value,out}": "attn.{q,k,v,out}_proj.weight",
                "mlp/{up,down}{,_bias}": "mlp.fc_{in,out}.{weight,bias}"}, PARALLEL)


def read(f):
    sizes, size = read_sizes(f), f.take("rotary_dim")
    f.take("max_position_embeddings", None)
    for name in ("rotary", "scale_attn_weights"):  # written in files, and taken for granted
        f.only(name, True, default=True)
    if size is None:
        f.refuse("rotary_dim = None is not supported; the number of channels to be turned is")
    rotary = Rotary(size=None if size == sizes["head_size"] else size, interleaved=True)
    mlp = MLP(f.take("n_inner") or 4 * f.take("hidden_size"), f.choose("activation_function", ACTIVATIONS), bias=True)
    norm = LayerNorm(f.take("layer_norm_epsilon"))
    blocks = [parallel(Attention(**sizes, positions=rotary), mlp, norm)] * f.take("num_hidden_layers")
    return read_decoder(f, blocks, norm, head_bias=True)


def write(config):
    attentions, mlp = each(config, Attention), each(config, MLP)[0]
    heads, size = attentions[0].heads, attentions[0].positions.size
    return {**write_decoder(config), "num_hidden_layers": len(attentions), "num_attention_heads": heads,
            "rotary_dim": size or config.width // heads, "n_inner": mlp.hidden,
            "activation_function": write_activation(mlp), "layer_norm_epsilon": config.norm.eps}


FAMILY = Family(("gptj",), "GPTJForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK, "transformer.h.{i}."),),
                spelling=SPELLING, base="transformer.", buffers=("*.attn.bias", "*.attn.embed_positions"))
