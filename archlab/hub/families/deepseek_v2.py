"""DeepSeek-V2 and V2-Lite (arXiv:2405.04434): attention through a latent, and many small experts beside shared ones,
after first layers that are dense. What V3 has too is read and written here."""

from archlab.attention.latent import LatentAttention
from archlab.experts.balance import SwitchLoss
from archlab.experts.moe import MoE
from archlab.experts.routers import Groups, TopK
from archlab.hub.decoders import ACTIVATIONS, OUTER, PRE_NORMS, read_decoder, write_activation, write_decoder
from archlab.hub.experts import experts_at, feed_forwards
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.hub.layout import Fused
from archlab.hub.rope import read_rotary, write_rotary
from archlab.layers.mlp import MLP
from archlab.layers.norms import RMSNorm
from archlab.layers.sequence import Parallel
from archlab.model import LanguageModel

DEFAULTS = dict(vocab_size=102400, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                num_attention_heads=32, hidden_act="silu", max_position_embeddings=2048, rms_norm_eps=1e-6,
                tie_word_embeddings=False, attention_bias=False, first_k_dense_replace=0, kv_lora_rank=512,
                q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64,
                n_shared_experts=2, moe_intermediate_size=1407, num_experts_per_tok=None, routed_scaling_factor=1.0,
                n_group=None, topk_group=None, topk_method="greedy", norm_topk_prob=False, aux_loss_alpha=0.001,
                seq_aux=True)
LATENT_NORM = RMSNorm(1e-6)  # whatever rms_norm_eps

ATTENTION = {"layers/0/layer/query": "self_attn.q_proj.weight",
             "layers/0/layer/query_down{,_bias}": "self_attn.q_a_proj.{weight,bias}",
             "layers/0/layer/{query,latent}_norm/scale": "self_attn.{q,kv}_a_layernorm.weight",
             "layers/0/layer/query_up": "self_attn.q_b_proj.weight",
             "layers/0/layer/{latent,shared_key}": "self_attn.kv_a_proj_with_mqa.weight",
             "layers/0/layer/{latent,shared_key}_bias": "self_attn.kv_a_proj_with_mqa.bias",
             "layers/0/layer/{key,value}_up": Fused("self_attn.kv_b_proj.weight"),
             "layers/0/layer/out{,_bias}": "self_attn.o_proj.{weight,bias}"}
BLOCK = ATTENTION | PRE_NORMS | experts_at("layers/1/layer/layers/0", "mlp") | {
    "layers/1/layer/layers/0/router/balance": "mlp.gate.e_score_correction_bias",  # V3
    "layers/1/layer/layers/1/{gate,up,down}": "mlp.shared_experts.{gate,up,down}_proj.weight",
    "layers/1/layer/{gate,up,down}": "mlp.{gate,up,down}_proj.weight"}


def read(f):
    f.only("mlp_bias", False, default=False)
    f.only("norm_topk_prob", False, None)
    f.only("scoring_func", "softmax", default="softmax")
    count, keep = f.whole("n_group"), f.whole("topk_group")
    limited = f.only("topk_method", "greedy", "group_limited_greedy") != "greedy"
    router = TopK(f.take("num_experts_per_tok"), scale=f.positive("routed_scaling_factor"),
                  groups=Groups(count, keep) if limited else None)
    return read_model(f, router, interleaved=True)


def read_model(f, router: TopK, interleaved: bool) -> LanguageModel:
    """The model with this router, and with positions that turn pairs of channels side by side or not."""
    f.only("moe_layer_freq", 1, default=1)
    f.take("ep_size", None)  # across devices
    f.take("num_nextn_predict_layers", None)  # layers that come after those that are read
    norm, attention = RMSNorm(f.take("rms_norm_eps")), read_latent(f, interleaved)
    alpha, per = f.take("aux_loss_alpha"), "sequence" if f.take("seq_aux") else "batch"
    experts = MoE(f.positive("n_routed_experts"), f.positive("moe_intermediate_size"), router,
                  activation=f.choose("hidden_act", ACTIVATIONS), balance=(SwitchLoss(alpha, per),) if alpha else ())
    shared = MLP(f.positive("n_shared_experts") * experts.hidden, experts.activation, gated=True)
    sparse, dense = Parallel(experts, shared), MLP(f.take("intermediate_size"), experts.activation, gated=True)
    first, layers = f.take("first_k_dense_replace"), f.take("num_hidden_layers")
    blocks = [sequential(attention, dense if i < first else sparse, norm) for i in range(layers)]
    return read_decoder(f, blocks, norm)


def read_latent(f, interleaved: bool) -> LatentAttention:
    heads, content, rotary = (f.positive(name) for name in ("num_attention_heads", "qk_nope_head_dim",
                                                            "qk_rope_head_dim"))
    f.only("num_key_value_heads", heads, None, default=None)
    f.only("head_dim", rotary, None, default=None)
    f.only("qk_head_dim", content + rotary, default=content + rotary)
    return LatentAttention(heads, f.positive("kv_lora_rank"), f.whole("q_lora_rank"), content, rotary,
                           f.positive("v_head_dim"), read_rotary(f, rotary, interleaved=interleaved), LATENT_NORM,
                           f.take("attention_bias"))


def write(config):
    router = each(config, MoE)[0].router
    groups = {"topk_method": "greedy", "n_group": None, "topk_group": None}
    if router.groups:
        groups = {"topk_method": "group_limited_greedy", "n_group": router.groups.count,
                  "topk_group": router.groups.keep}
    return {**write_model(config), **groups, "norm_topk_prob": False}


def write_model(config: LanguageModel) -> dict:
    """The inverse of `read_model`, and the router's k and scale."""
    attentions, layers = each(config, LatentAttention), feed_forwards(config)
    attention, (moe, shared) = attentions[0], layers[-1].layers
    dense = [layer.hidden for layer in layers if isinstance(layer, MLP)]
    loss = moe.balance[0] if moe.balance else SwitchLoss(0.0)
    return {**write_decoder(config), **write_rotary(attention.positions, attention.rotary_size),
            "num_hidden_layers": len(attentions), "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.heads, "kv_lora_rank": attention.rank, "q_lora_rank": attention.query_rank,
            "qk_nope_head_dim": attention.content_size, "qk_rope_head_dim": attention.rotary_size,
            "head_dim": attention.rotary_size, "v_head_dim": attention.value_size, "attention_bias": attention.bias,
            "first_k_dense_replace": len(dense), **{"intermediate_size": hidden for hidden in dense},
            "n_routed_experts": moe.experts, "moe_intermediate_size": moe.hidden,
            "n_shared_experts": shared.hidden // moe.hidden, "num_experts_per_tok": moe.router.k,
            "routed_scaling_factor": moe.router.scale, "hidden_act": write_activation(moe),
            "aux_loss_alpha": loss.weight, "seq_aux": loss.per == "sequence", "rms_norm_eps": config.norm.eps}


FAMILY = Family(("deepseek_v2",), "DeepseekV2ForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
