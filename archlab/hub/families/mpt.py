"""MPT (MosaicML 2023): no biases anywhere, ALiBi, queries, keys and values sometimes clipped."""

from archlab.attention.attention import Attention
from archlab.attention.positions import ALiBi
from archlab.hub.decoders import read_decoder, read_sizes, write_decoder
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import SEQUENTIAL, placed, sequential
from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm

DEFAULTS = dict(vocab_size=50368, hidden_size=2048, num_attention_heads=16, num_hidden_layers=24, expansion_ratio=4,
                layer_norm_epsilon=1e-5, logit_scale=None, no_bias=True, norm_type="low_precision_layernorm",
                tie_word_embeddings=True)
SPELLING = dict(hidden_size="d_model", num_attention_heads="n_heads", num_hidden_layers="n_layers",
                max_position_embeddings="max_seq_len")
ATTENTION = dict(attn_type="multihead_attention", prefix_lm=False, qk_ln=False, attn_uses_sequence_id=False, alibi=True,
                 alibi_bias_max=8)  # all that transformers can do

OUTER = {"embed/table": "transformer.wte.weight", "norm/scale": "transformer.norm_f.weight",
         "head/weight": "lm_head.weight"}
BLOCK = placed({"norm1/scale": "norm_1.weight", "norm2/scale": "norm_2.weight",
                "attention/{query,key,value}": "attn.Wqkv.weight", "attention/out": "attn.out_proj.weight",
                "mlp/{up,down}": "ffn.{up,down}_proj.weight"}, SEQUENTIAL)


def read(f):
    inner = f.inside("attn_config")
    for name, value in ATTENTION.items():
        inner.only(name, value, default=value)
    f.only("expansion_ratio", 4)
    f.only("logit_scale", None)
    f.only("no_bias", True)
    f.only("norm_type", "low_precision_layernorm", "layernorm")
    for name in ("embedding_fraction", "init_config", "learned_pos_emb", "max_position_embeddings", "tokenizer_name",
                 "verbose"):
        f.take(name, None)  # training, and a table that ALiBi does without
    inner.take("attn_impl", None)
    norm, sizes = LayerNorm(f.take("layer_norm_epsilon"), bias=False), read_sizes(f)
    attention = Attention(**sizes, positions=ALiBi(), scale=inner.take("softmax_scale", None),
                          clip=inner.take("clip_qkv", None) or None)
    block = sequential(attention, MLP(4 * f.take("hidden_size"), "gelu"), norm)
    return read_decoder(f, [block] * f.take("num_hidden_layers"), norm)


def write(config):
    attentions = each(config, Attention)
    first = attentions[0]
    return {**write_decoder(config), "num_attention_heads": first.heads, "num_hidden_layers": len(attentions),
            "layer_norm_epsilon": config.norm.eps,
            "attn_config": {"softmax_scale": first.scale, "clip_qkv": first.clip, **ATTENTION}}


FAMILY = Family(("mpt",), "MptForCausalLM", DEFAULTS, read, write, OUTER,
                (Blocks(BLOCK, "transformer.blocks.{i}."),), spelling=SPELLING, base="transformer.")
