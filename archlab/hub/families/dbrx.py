"""DBRX (Databricks 2024): four of sixteen experts in every layer, LayerNorms without biases, clipped attention."""

from archlab.attention.attention import Attention
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.hub.decoders import ACTIVATIONS, read_decoder, write_activation, write_decoder
from archlab.hub.experts import read_balance, write_balance
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.hub.layout import Joined
from archlab.hub.rope import read_rotary, write_rotary
from archlab.layers.norms import LayerNorm

DEFAULTS = dict(vocab_size=32000, hidden_size=2048, num_attention_heads=16, num_hidden_layers=24,
                max_position_embeddings=2048, tie_word_embeddings=False)
SPELLING = dict(hidden_size="d_model", num_attention_heads="n_heads", num_hidden_layers="n_layers",
                max_position_embeddings="max_seq_len")
ATTENTION = dict(kv_n_heads=1, clip_qkv=None, rope_theta=10000.0)  # the defaults of attn_config, and of ffn_config
EXPERTS = dict(moe_num_experts=4, ffn_hidden_size=3584, moe_top_k=1, moe_normalize_expert_weights=1.0,
               moe_loss_weight=0.01, uniform_expert_assignment=False)
NORM = LayerNorm(1e-5, bias=False)

OUTER = {"embed/table": "transformer.wte.weight", "norm/scale": "transformer.norm_f.weight",
         "head/weight": "lm_head.weight"}
BLOCK = {"layers/{0,1}/before/scale": "norm_attn_norm.norm_{1,2}.weight",
         "layers/0/layer/{query,key,value}": "norm_attn_norm.attn.Wqkv.weight",
         "layers/0/layer/out": "norm_attn_norm.attn.out_proj.weight",
         "layers/1/layer/router/weight": "ffn.router.layer.weight",
         "layers/1/layer/{gate,up,down}": Joined("ffn.experts.mlp.{w1,v1,w2}")}


def read(f):
    attention, experts = f.inside("attn_config", ATTENTION), f.inside("ffn_config", EXPERTS)
    for inner in (attention, experts):  # both carry copies, and what any config of transformers has
        for name in ("hidden_size", "moe_jitter_eps", "tie_word_embeddings"):
            inner.take(name, None)
    for name in ("max_position_embeddings", "router_aux_loss_coef"):  # moe_loss_weight is what counts
        f.take(name, None)
    f.only("tie_word_embeddings", False)
    heads, kv_heads = f.positive("num_attention_heads"), attention.positive("kv_n_heads")
    f.only("num_key_value_heads", kv_heads, default=kv_heads)
    size = f.take("hidden_size") // heads
    attend = Attention(heads, kv_heads, size, read_rotary(f, size, base=attention.take("rope_theta")),
                       clip=attention.take("clip_qkv"))

    normed = experts.only("moe_normalize_expert_weights", 1.0, None) is not None
    router = TopK(experts.take("moe_top_k"), renormalise=normed)
    experts.only("uniform_expert_assignment", False)
    activation = experts.inside("ffn_act_fn").choose("name", ACTIVATIONS, default="silu")
    moe = MoE(experts.positive("moe_num_experts"), experts.positive("ffn_hidden_size"), router,
              activation=activation, balance=read_balance(experts, router.k, "moe_loss_weight"))
    return read_decoder(f, [sequential(attend, moe, NORM)] * f.take("num_hidden_layers"), NORM)


def write(config):
    attentions, moe = each(config, Attention), each(config, MoE)[0]
    first = attentions[0]
    kv_heads, rotary = first.kv_heads or first.heads, write_rotary(first.positions, config.width // first.heads)
    attention = {"kv_n_heads": kv_heads, "clip_qkv": first.clip, "rope_theta": rotary["rope_theta"]}
    experts = {"moe_num_experts": moe.experts, "ffn_hidden_size": moe.hidden, "moe_top_k": moe.router.k,
               "ffn_act_fn": {"name": write_activation(moe)}, "moe_loss_weight": write_balance(moe),
               "moe_normalize_expert_weights": 1.0 if moe.router.renormalise else None}
    return {**write_decoder(config), **rotary, "num_attention_heads": first.heads, "num_key_value_heads": kv_heads,
            "num_hidden_layers": len(attentions), "attn_config": attention, "ffn_config": experts}


FAMILY = Family(("dbrx",), "DbrxForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK, "transformer.blocks.{i}."),),
                spelling=SPELLING, base="transformer.")
