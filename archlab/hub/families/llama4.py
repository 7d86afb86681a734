"""Llama 4 (Meta 2025), its text, alone or in a checkpoint that sees images besides: chunks of the text with positions,
all of it without, and experts whose gates scale what they read, beside one that is shared."""

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary, Temperature
from archlab.attention.qk_norm import QKNorm
from archlab.experts.routers import TopK
from archlab.hub.decoders import (ATTENTION, OUTER, PRE_NORMS, read_attention, read_decoder, read_sizes,
                                  write_attention, write_decoder)
from archlab.hub.experts import feed_forwards, read_moe, write_moe
from archlab.hub.family import Blocks, Family, each
from archlab.hub.forms import sequential
from archlab.hub.layout import InputsFirst
from archlab.hub.rope import FULL, read_rotary
from archlab.layers.mlp import MLP
from archlab.layers.norms import RMSNorm
from archlab.layers.sequence import Parallel

DEFAULTS = dict(vocab_size=202048, hidden_size=5120, intermediate_size=8192, intermediate_size_mlp=16384,
                num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, head_dim=128, hidden_act="silu",
                max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False, num_experts_per_tok=1,
                num_local_experts=16, moe_layers=None, interleave_moe_layer_step=1, use_qk_norm=True,
                router_aux_loss_coef=0.001, no_rope_layers=None, no_rope_layer_interval=4, attention_chunk_size=8192,
                layer_types=None, floor_scale=8192, attn_scale=0.1, attention_bias=False)
CHUNKED = "chunked_attention"
SEEING = ("vision_config", "boi_token_index", "eoi_token_index", "image_token_index")

EXPERTS = {"layers/1/layer/layers/0/{gate,up}": InputsFirst("feed_forward.experts.gate_up_proj"),
           "layers/1/layer/layers/0/down": InputsFirst("feed_forward.experts.down_proj"),
           "layers/1/layer/layers/0/router/weight": "feed_forward.router.weight",
           "layers/1/layer/layers/1/{gate,up,down}": "feed_forward.shared_expert.{gate,up,down}_proj.weight"}
DENSE = {"layers/1/layer/{gate,up,down}": "feed_forward.{gate,up,down}_proj.weight"}


def read(f):
    if "text_config" in f:
        for name in SEEING:
            f.take(name, None)
        f.only("tie_word_embeddings", False)
        f = f.inside("text_config", DEFAULTS)
    norm, bias = RMSNorm(f.take("rms_norm_eps")), f.take("attention_bias")
    f.only("for_llm_compressor", False, default=False)  # with it experts are tensors of their own
    rotary = read_rotary(f, read_sizes(f)["head_size"], base=500000.0, interleaved=True)
    far = Temperature(f.take("attn_scale"), f.take("floor_scale"))
    far = far if f.take("attn_temperature_tuning", True) else None  # published as 4, which is true
    qk_norm = QKNorm(RMSNorm(norm.eps, gain=False), after=True) if f.take("use_qk_norm") else None

    router = TopK(f.take("num_experts_per_tok"), score="sigmoid")
    experts = read_moe(f, "num_local_experts", "intermediate_size", router, scale_input=True)
    sparse = Parallel(experts, MLP(experts.hidden, experts.activation, gated=True))
    dense = MLP(f.positive("intermediate_size_mlp"), experts.activation, gated=True)
    layers, step, chosen = f.take("num_hidden_layers"), f.positive("interleave_moe_layer_step"), f.take("moe_layers")
    chosen = range(step - 1, layers, step) if chosen is None else chosen

    def block(i, turn, chunk):
        attention = read_attention(f, positions=rotary if turn else far, qk_norm=qk_norm if turn else None, chunk=chunk,
                                   bias=bias, out_bias=bias)
        return sequential(attention, sparse if i in chosen else dense, norm)

    return read_decoder(f, [block(i, *kind) for i, kind in enumerate(read_kinds(f, layers))], norm)


def read_kinds(f, layers: int) -> list[tuple[bool, int | None]]:
    """Of each layer whether it has rotary positions, and its chunk."""
    interval, chunk = f.positive("no_rope_layer_interval"), f.whole("attention_chunk_size")
    turned = f.take("no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]  # 1 where rope IS used
    types = f.take("layer_types") or [CHUNKED if turn else FULL for turn in turned[:layers]]
    if len(turned) < layers:
        f.refuse(f"no_rope_layers = {turned}: must be {layers} numbers, 1 for each layer with positions, 0 for others")
    if len(types) != layers or not set(types) <= {CHUNKED, FULL}:
        f.refuse(f"layer_types = {types}: must be {layers} times {FULL!r} or {CHUNKED!r}, one for each layer")
    if CHUNKED in types and not chunk:
        f.refuse("attention_chunk_size = null is not supported with layers that see a chunk")
    return [(bool(turn), chunk if kind == CHUNKED else None) for turn, kind in zip(turned, types)]


def write(config):
    attentions, layers = each(config, Attention), feed_forwards(config)
    sparse = [isinstance(layer, Parallel) for layer in layers]
    chunks = {a.chunk for a in attentions} - {None}
    far = next((a.positions for a in attentions if isinstance(a.positions, Temperature)), None)
    return {**write_decoder(config), **write_attention(config),
            **write_moe(config, "num_local_experts", "intermediate_size"),
            "moe_layers": [i for i, moe in enumerate(sparse) if moe],
            **{"intermediate_size_mlp": layer.hidden for layer, moe in zip(layers, sparse) if not moe},
            "no_rope_layers": [int(isinstance(a.positions, Rotary)) for a in attentions],
            "layer_types": [CHUNKED if a.chunk else FULL for a in attentions],
            **{"attention_chunk_size": chunk for chunk in chunks}, "attn_temperature_tuning": far is not None,
            **({"attn_scale": far.scale, "floor_scale": far.floor} if far else {}),
            "use_qk_norm": any(a.qk_norm for a in attentions), "attention_bias": attentions[0].bias,
            "rms_norm_eps": config.norm.eps}


FAMILY = Family(("llama4_text", "llama4"), "Llama4ForCausalLM", DEFAULTS, read, write, OUTER,
                (Blocks(ATTENTION | PRE_NORMS | EXPERTS | DENSE),), inside="language_model.",
                buffers=(".vision_model.*", ".multi_modal_projector.*"))
