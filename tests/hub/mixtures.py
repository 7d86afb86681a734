"""The fixtures with mixtures of experts, and where transformers sends their tokens; written by make_fixtures.

Beside logits and greedy text their expected.safetensors has, of the L layers with experts, numbered in `moe_layers`,
router_logits [L, 2, T, E], chosen [L, 2, T, k], the experts of each token in ascending order, and chosen_weights, what
the output of each (in Llama 4: the input of each) is multiplied by. The encoder's have `source_` in front.
"""

import re

import torch

GPT_OSS, LLAMA4 = "GptOssExperts", "Llama4TextExperts"  # their experts map [D, 2F], those of all others [2F, D]


def rope(theta=500.0, **more):
    return dict(rope_parameters={"rope_type": "default", "rope_theta": theta, **more})


IDS = dict(vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
BASE = IDS | rope() | dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                           intermediate_size=10, rms_norm_eps=3e-3, max_position_embeddings=64, num_experts_per_tok=3)
WIDE = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=256)  # 8 frequencies
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
QWEN = BASE | dict(intermediate_size=18, moe_intermediate_size=8, num_experts=8)
MULTIPLIERS = dict(embedding_multiplier=3.0, logits_scaling=0.7, residual_multiplier=0.4, attention_multiplier=0.5)
DEEPSEEK = BASE | dict(
    intermediate_size=18, moe_intermediate_size=8, n_routed_experts=8, first_k_dense_replace=1, num_key_value_heads=2,
    num_hidden_layers=3, num_attention_heads=2, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10, kv_lora_rank=12,
    max_position_embeddings=256)
Q_LORA = dict(q_lora_rank=14, n_group=4, topk_group=2)
LLAMA4_TEXT = BASE | WIDE | dict(num_local_experts=4, num_hidden_layers=4, intermediate_size_mlp=18,
                                 attention_chunk_size=7, floor_scale=4, attn_scale=0.4, num_experts_per_tok=1)
OSS = BASE | WIDE | dict(num_local_experts=6)
DBRX = IDS | dict(d_model=24, n_heads=4, n_layers=2, max_seq_len=64)
SWITCH = IDS | dict(d_model=24, d_kv=8, d_ff=16, num_heads=2, layer_norm_epsilon=3e-3, decoder_start_token_id=0,
                    relative_attention_num_buckets=8, relative_attention_max_distance=12, num_experts=4)

MIXTURES = {  # name: class of the config, and its arguments
    "mixtral": ("Mixtral", BASE | dict(num_local_experts=6, sliding_window=5)),
    "mixtral-full": ("Mixtral", BASE | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8, hidden_act="gelu",
                                            tie_word_embeddings=True)),
    "qwen2_moe": ("Qwen2Moe", QWEN | dict(num_hidden_layers=4, decoder_sparse_step=2,
                                          shared_expert_intermediate_size=12)),
    "qwen2_moe-sliding": ("Qwen2Moe", QWEN | dict(
        num_hidden_layers=4, mlp_only_layers=[1, 3], shared_expert_intermediate_size=12, norm_topk_prob=True,
        qkv_bias=False, use_sliding_window=True, sliding_window=5, max_window_layers=2)),
    "qwen3_moe": ("Qwen3Moe", QWEN | dict(num_hidden_layers=3, mlp_only_layers=[1], norm_topk_prob=True, head_dim=8)),
    "qwen3_moe-raw": ("Qwen3Moe", QWEN | dict(
        decoder_sparse_step=2, use_sliding_window=True, sliding_window=5, attention_bias=True, hidden_act="gelu",
        tie_word_embeddings=True)),
    "olmoe": ("Olmoe", BASE | dict(num_experts=8, num_key_value_heads=4)),
    "olmoe-clip": ("Olmoe", BASE | dict(num_experts=8, clip_qkv=0.9, norm_topk_prob=True, attention_bias=True)),
    "granitemoe": ("GraniteMoe", BASE | MULTIPLIERS | dict(num_local_experts=6, tie_word_embeddings=True)),
    "granitemoe-bias": ("GraniteMoe", BASE | dict(num_local_experts=6, attention_bias=True)),
    "granitemoeshared": ("GraniteMoeShared", BASE | MULTIPLIERS | dict(num_local_experts=6,
                                                                       shared_intermediate_size=12)),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK | dict(q_lora_rank=None, n_shared_experts=2, routed_scaling_factor=0.6)),
    "deepseek_v2-groups": ("DeepseekV2", DEEPSEEK | Q_LORA | rope(**YARN, mscale=0.7, mscale_all_dim=1.6) | dict(
        topk_method="group_limited_greedy", routed_scaling_factor=2.5, n_shared_experts=1, attention_bias=True)),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | Q_LORA | rope(**YARN, mscale=1.0, mscale_all_dim=1.0, beta_fast=2)),
    "deepseek_v3-halves": ("DeepseekV3", DEEPSEEK | dict(
        rope_interleave=False, q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False, n_shared_experts=2,
        routed_scaling_factor=1.5, attention_bias=True)),
    "deepseek_v3-mtp": ("DeepseekV3", DEEPSEEK | Q_LORA | rope(**YARN) | dict(num_hidden_layers=2)),
    "llama4": ("Llama4Text", LLAMA4_TEXT | dict(no_rope_layer_interval=3, interleave_moe_layer_step=2) | rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=1.0,
        original_max_position_embeddings=32)),
    "llama4-multimodal": ("Llama4Text", LLAMA4_TEXT | dict(num_hidden_layers=2)),
    "llama4-two": ("Llama4Text", LLAMA4_TEXT | dict(
        num_hidden_layers=3, no_rope_layers=[0, 1, 1], moe_layers=[0, 2], num_experts_per_tok=2, use_qk_norm=False,
        attention_bias=True, attn_temperature_tuning=False)),
    "gpt_oss": ("GptOss", OSS | rope(**YARN, truncate=False) | dict(
        sliding_window=5, num_hidden_layers=3, swiglu_limit=1.2, swiglu_alpha=1.4)),
    "gpt_oss-mxfp4": ("GptOss", OSS | rope(**YARN, truncate=False) | dict(
        sliding_window=5, hidden_size=32, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2)),
    "gpt_oss-full": ("GptOss", OSS | dict(layer_types=["full_attention"] * 2, attention_bias=False)),
    "dbrx": ("Dbrx", DBRX | rope() | dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=1.0, rope_theta=500.0),
        ffn_config=dict(ffn_hidden_size=10, moe_num_experts=6, moe_top_k=3))),
    "dbrx-raw": ("Dbrx", DBRX | rope() | dict(
        attn_config=dict(rope_theta=500.0, clip_qkv=1.5), ffn_config=dict(
            ffn_hidden_size=10, moe_num_experts=4, moe_top_k=2, moe_normalize_expert_weights=None,
            ffn_act_fn={"name": "gelu"}))),
    "switch_transformers": ("SwitchTransformers", SWITCH | dict(
        num_layers=4, num_sparse_encoder_layers=2, num_decoder_layers=2, num_sparse_decoder_layers=1)),
    "switch_transformers-bias": ("SwitchTransformers", SWITCH | dict(
        num_layers=1, num_sparse_encoder_layers=1, num_decoder_layers=3, num_sparse_decoder_layers=2,
        router_bias=True, tie_word_embeddings=False, dense_act_fn="gelu")),
}

ABSENT = object()  # a field that older files do not have
DEEPSEEK_OLDER = dict(head_dim=ABSENT, qk_head_dim=ABSENT, rope_interleave=ABSENT, output_router_logits=ABSENT,
                      aux_loss_alpha=0.001, seq_aux=True, ep_size=1, moe_layer_freq=1)
MIXTURES_OLDER = {  # written in the older words too, with these fields beyond the renamings
    "mixtral": dict(head_dim=ABSENT), "mixtral-full": {}, "olmoe": dict(rope_scaling=None), "granitemoe": {},
    "granitemoeshared": {},
    "qwen2_moe": dict(sliding_window=32, max_window_layers=3, qkv_bias=ABSENT, mlp_only_layers=ABSENT),
    "qwen3_moe": dict(num_local_experts=ABSENT, num_experts=8, max_window_layers=3, rope_scaling=None),
    "deepseek_v2": DEEPSEEK_OLDER | dict(scoring_func="softmax", mlp_bias=ABSENT),
    "deepseek_v2-groups": DEEPSEEK_OLDER | dict(scoring_func="softmax", mlp_bias=ABSENT),
    "deepseek_v3": DEEPSEEK_OLDER | dict(scoring_func="sigmoid", topk_method="noaux_tc"),
    "llama4": dict(no_rope_layers=[], moe_layers=ABSENT, for_llm_compressor=False, attn_temperature_tuning=4,
                   cache_implementation="hybrid"),
    "gpt_oss-mxfp4": dict(swiglu_alpha=ABSENT, attention_bias=True, experts_per_token=2, initial_context_length=64),
    "dbrx": dict(num_key_value_heads=ABSENT, router_aux_loss_coef=0.05),
    "switch_transformers": dict(router_type="tokens_masked", feed_forward_proj="relu", is_gated_act=False,
                                output_router_logits=True, output_past=True),
}
MIXTURES_PUBLISHED = ("gpt_oss-mxfp4", "deepseek_v3-mtp", "llama4-multimodal")  # with other tensors, as on the hub
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # and their negatives, 8 further


def to_fp4(weights):
    """The codes (0 to 15) and exponents [..., 1] of weights [..., 32]: the nearest FP4 * 2^exponent of either sign."""
    exponents = (weights.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    codes = ((weights * 2**-exponents).abs()[..., None] - FP4).abs().argmin(-1)
    return codes + 8 * (weights < 0), exponents


def through_fp4(weights):
    """The numbers that are left of matrices [E, inputs, outputs] in blocks of 32 inputs."""
    codes, exponents = to_fp4(weights.mT.unflatten(-1, (-1, 32)))
    return (torch.cat([FP4, -FP4])[codes] * 2**exponents).flatten(-2).mT


def publish(weights, config):
    """The tensors and the config as the hub has them where it is not as transformers saves them."""
    if config["model_type"] == "gpt_oss":  # the experts in MXFP4: two codes a byte, an exponent for each 32 of them
        for name in [name for name in weights if name.endswith("_proj") and ".experts." in name]:
            codes, exponents = to_fp4(weights.pop(name).float().mT.unflatten(-1, (-1, 32)))
            weights[name + "_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
            weights[name + "_scales"] = (exponents[..., 0] + 127).to(torch.uint8)
        config["quantization_config"] = dict(quant_method="mxfp4", modules_to_not_convert=[
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"])
    elif config["model_type"] == "deepseek_v3":  # one layer more, which predicts the token after the next
        last, more = f"model.layers.{config['num_hidden_layers'] - 1}.", f"model.layers.{config['num_hidden_layers']}."
        weights |= {more + name.removeprefix(last): x + 1 for name, x in weights.items() if name.startswith(last)}
        table, gain = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
        weights |= {more + "embed_tokens.weight": table.clone(), more + "shared_head.head.weight": table + 1,
                    more + "eh_proj.weight": torch.cat([table, table], 1)[:table.shape[1]].clone()}
        weights |= {more + name + ".weight": gain + 1 for name in ("enorm", "hnorm", "shared_head.norm")}
    else:  # Llama 4's language model is a part of one that sees
        weights = {"language_model." + name: x for name, x in weights.items()}
        weights["multi_modal_projector.linear_1.weight"] = torch.ones(config["hidden_size"], 8)
        weights["vision_model.class_embedding"] = torch.ones(8)
        vision = dict(model_type="llama4_vision_model", hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        outer = {name: config.pop(name) for name in ("architectures", "dtype", "transformers_version")}
        config = outer | dict(model_type="llama4", text_config=config, vision_config=vision, boi_token_index=60,
                              eoi_token_index=61, image_token_index=62, tie_word_embeddings=False,
                              architectures=["Llama4ForConditionalGeneration"])
    return weights, config


def fan_in(module, name, weight):
    """How many inputs each output of a matrix, or of a stack of matrices, is a sum over."""
    kind = type(module).__name__
    if kind == "DbrxExpertGLU":  # one matrix after another along their hidden units
        return module.ffn_hidden_size if name == "w2" else module.hidden_size
    if weight.ndim == 3:
        return weight.shape[1 if kind in (GPT_OSS, LLAMA4) else 2]
    return weight.shape[0 if kind == "Conv1D" else 1]


def decisions(model, name, output):
    """(logits [N, E], experts [N, k], their weights [N, k]) in what the router of this name gave out."""
    router = model.get_submodule(name)
    kind = type(router).__name__
    if kind == "Llama4Router":
        weights, logits = output  # 0 for experts that were not chosen
        weights, experts = weights.topk(router.top_k)
    elif kind == "DbrxRouter":
        logits = output
        weights, experts = model.get_submodule(name.rpartition(".")[0]).route_tokens_to_experts(logits)
    elif kind == "SwitchTransformersTop1Router":
        dispatch, weights, logits = (x.flatten(0, 1) for x in output)
        assert (dispatch.sum(-1) == 1).all(), f"{name} drops a token"
        experts = dispatch.argmax(-1, keepdim=True)
    else:
        logits, weights, experts = output
    experts, order = experts.sort(-1)
    return logits, experts, weights.gather(-1, order)


def watch(model, run, source):
    """({name of a router: its decisions while `run()` runs}, whether all would stand if its input were 0.1% off)."""
    found, stands = {}, []

    def note(name):
        def hook(router, args, output):
            found[name] = decisions(model, name, output)
            for _ in range(4):
                noisy = args[0] * (1 + 1e-3 * torch.randn(args[0].shape, generator=source))
                stands.append(torch.equal(decisions(model, name, router.forward(noisy))[1], found[name][1]))
        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()
             if type(module).__name__.endswith("Router")]
    run()
    for hook in hooks:
        hook.remove()
    return found, all(stands)


def routing(found):
    """The tensors of expected.safetensors; None where an expert of some layer is never chosen."""
    given = {}
    for prefix, side in (("source_", "encoder."), ("", "")):
        names = [name for name in found if name.startswith("encoder.") == bool(side)]
        if not names:
            continue
        logits, experts, weights = (torch.stack([x.unflatten(0, (2, -1)) for x in stack])
                                    for stack in zip(*(found[name] for name in names)))
        if any(len(layer.unique()) < logits.shape[-1] for layer in experts):
            return None
        given |= {prefix + "router_logits": logits, prefix + "chosen": experts, prefix + "chosen_weights": weights,
                  prefix + "moe_layers": torch.tensor([int(re.search(r"\d+", name)[0]) for name in names])}
    return given
