"""The fields that well-known checkpoints with experts have in config.json: they say what the zoo says. What cannot be
read is refused by name."""

import pytest

import archlab
from archlab.analysis.accounts import count_parameters
from archlab.attention.attention import Attention
from archlab.experts.moe import MoE
from archlab.hub.experts import feed_forwards
from archlab.hub.family import describe, each, family_of, settled
from archlab.layers.mlp import MLP

# What every file has and no network depends on.
ANYWHERE = dict(architectures=["..."], attention_dropout=0.0, bos_token_id=0, eos_token_id=[1, 106], use_cache=True,
                hidden_act="silu", initializer_range=0.02, tie_word_embeddings=False, torch_dtype="bfloat16",
                transformers_version="4.51.0")


def sizes(hidden, intermediate, layers, heads, kv_heads, vocab, **more):
    return dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, vocab_size=vocab, **more)


def llama4(**text):
    text = ANYWHERE | sizes(5120, 8192, 48, 40, 8, 202048) | dict(
        model_type="llama4_text", attention_bias=False, attention_chunk_size=8192, attn_scale=0.1,
        attn_temperature_tuning=4, cache_implementation="hybrid", floor_scale=8192, for_llm_compressor=False,
        head_dim=128, intermediate_size_mlp=16384, max_position_embeddings=1048576, no_rope_layers=[],
        num_experts_per_tok=1, output_router_logits=False, pad_token_id=200018, rms_norm_eps=1e-5, rope_scaling=None,
        rope_theta=500000.0, router_aux_loss_coef=0.001, router_jitter_noise=0.0) | text
    return dict(model_type="llama4", boi_token_index=200080, eoi_token_index=200081, image_token_index=200092,
                text_config=text, tie_word_embeddings=False, vision_config={"model_type": "llama4_vision_model"})


GPT_OSS = ANYWHERE | dict(
    model_type="gpt_oss", attention_bias=True, experts_per_token=4, head_dim=64, initial_context_length=4096,
    max_position_embeddings=131072, num_experts_per_tok=4, output_router_logits=False, rms_norm_eps=1e-5,
    rope_scaling=dict(beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096,
                      rope_type="yarn", truncate=False), rope_theta=150000, router_aux_loss_coef=0.9,
    sliding_window=128, swiglu_limit=7.0, quantization_config=dict(
        modules_to_not_convert=["model.layers.*.self_attn", "lm_head"], quant_method="mxfp4"))
DEEPSEEK = ANYWHERE | dict(
    attention_bias=False, auto_map={}, aux_loss_alpha=0.001, ep_size=1, first_k_dense_replace=1, kv_lora_rank=512,
    max_position_embeddings=163840, moe_layer_freq=1, n_shared_experts=2, norm_topk_prob=False, num_experts_per_tok=6,
    pretraining_tp=1, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-6,
    rope_theta=10000, seq_aux=True, v_head_dim=128)


def yarn(mscale):
    return dict(rope_scaling=dict(beta_fast=32, beta_slow=1, factor=40, mscale=mscale, mscale_all_dim=mscale,
                                  original_max_position_embeddings=4096, type="yarn"))


V2 = DEEPSEEK | dict(model_type="deepseek_v2", scoring_func="softmax")
V3 = DEEPSEEK | yarn(1.0) | sizes(7168, 18432, 61, 128, 128, 129280) | dict(
    model_type="deepseek_v3", first_k_dense_replace=3, moe_intermediate_size=2048, n_group=8, n_routed_experts=256,
    n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8, num_nextn_predict_layers=1,
    routed_scaling_factor=2.5, scoring_func="sigmoid", topk_group=4, topk_method="noaux_tc")

MIXTRAL = ANYWHERE | dict(model_type="mixtral", num_experts_per_tok=2, num_local_experts=8, output_router_logits=False,
                          max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None)
QWEN = ANYWHERE | dict(decoder_sparse_step=1, max_position_embeddings=40960, output_router_logits=False,
                       rms_norm_eps=1e-6, rope_theta=1000000.0, router_aux_loss_coef=0.001, use_sliding_window=False)
QWEN2 = QWEN | sizes(2048, 5632, 24, 16, 16, 151936) | dict(
    model_type="qwen2_moe", max_window_layers=21, moe_intermediate_size=1408, norm_topk_prob=False, num_experts=60,
    num_experts_per_tok=4, shared_expert_intermediate_size=5632, sliding_window=32768)
QWEN3 = QWEN | dict(
    model_type="qwen3_moe", attention_bias=False, head_dim=128, mlp_only_layers=[], norm_topk_prob=True,
    num_experts=128, num_experts_per_tok=8, rope_scaling=None, sliding_window=None)
OLMOE = ANYWHERE | sizes(2048, 1024, 16, 16, 16, 50304) | dict(
    model_type="olmoe", attention_bias=False, clip_qkv=None, max_position_embeddings=4096, norm_topk_prob=False,
    num_experts=64, num_experts_per_tok=8, output_router_logits=False, pad_token_id=1, rms_norm_eps=1e-5,
    rope_scaling=None, rope_theta=10000.0, router_aux_loss_coef=0.01)
GRANITE = ANYWHERE | sizes(1024, 512, 24, 16, 8, 49155) | dict(
    model_type="granitemoe", attention_bias=False, attention_multiplier=0.015625, embedding_multiplier=12.0,
    logits_scaling=6.0, max_position_embeddings=4096, num_experts_per_tok=8, num_local_experts=32,
    output_router_logits=False, residual_multiplier=0.22, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=10000,
    router_aux_loss_coef=0.0, tie_word_embeddings=True)
DBRX = dict(
    model_type="dbrx", architectures=["DbrxForCausalLM"], auto_map={}, d_model=6144, emb_pdrop=0.0,
    initializer_range=0.02, max_seq_len=32768, n_heads=48, n_layers=40, output_router_logits=False, resid_pdrop=0.0,
    router_aux_loss_coef=0.05, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, vocab_size=100352,
    attn_config=dict(clip_qkv=8, kv_n_heads=8, model_type="", rope_theta=500000),
    ffn_config=dict(ffn_hidden_size=10752, model_type="", moe_jitter_eps=0, moe_loss_weight=0.05, moe_num_experts=16,
                    moe_top_k=4))


def dbrx(**experts):
    return DBRX | dict(ffn_config=DBRX["ffn_config"] | experts)


SWITCH = dict(
    model_type="switch_transformers", add_router_probs=False, d_ff=3072, d_kv=64, d_model=768, decoder_sparse_step=2,
    decoder_start_token_id=0, dense_act_fn="relu", dropout_rate=0.1, encoder_sparse_step=2, expert_capacity=64,
    feed_forward_proj="relu", is_encoder_decoder=True, is_gated_act=False, layer_norm_epsilon=1e-6,
    num_decoder_layers=12, num_heads=12, num_layers=12, num_sparse_decoder_layers=6, num_sparse_encoder_layers=6,
    output_past=True, relative_attention_max_distance=128, relative_attention_num_buckets=32, router_bias=False,
    router_dtype="float32", router_ignore_padding_tokens=False, router_jitter_noise=0.01, router_type="tokens_masked",
    vocab_size=32128)

PUBLISHED = {  # our name: the fields of its config.json
    "mixtral-8x7b": MIXTRAL | sizes(4096, 14336, 32, 32, 8, 32000),
    "mixtral-8x22b": MIXTRAL | sizes(6144, 16384, 56, 48, 8, 32768),
    "qwen1.5-moe-a2.7b": QWEN2,
    "qwen3-30b-a3b": QWEN3 | sizes(2048, 6144, 48, 32, 4, 151936, moe_intermediate_size=768),
    "qwen3-235b-a22b": QWEN3 | sizes(4096, 12288, 94, 64, 4, 151936, moe_intermediate_size=1536),
    "olmoe-1b-7b": OLMOE,
    "switch-base-128": SWITCH | dict(num_experts=128),
    "llama4-scout": llama4(num_local_experts=16, interleave_moe_layer_step=1, use_qk_norm=True, rope_scaling=dict(
        factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
        rope_type="llama3")),
    "llama4-maverick": llama4(num_local_experts=128, interleave_moe_layer_step=2, use_qk_norm=False),
    "gpt-oss-20b": GPT_OSS | sizes(2880, 2880, 24, 64, 8, 201088, num_local_experts=32),
    "gpt-oss-120b": GPT_OSS | sizes(2880, 2880, 36, 64, 8, 201088, num_local_experts=128),
    "deepseek-v2-lite": V2 | yarn(0.707) | sizes(
        2048, 10944, 27, 16, 16, 102400, moe_intermediate_size=1408, n_group=1, n_routed_experts=64, q_lora_rank=None,
        routed_scaling_factor=1.0, topk_group=1, topk_method="greedy"),
    "deepseek-v2": V2 | yarn(1.0) | sizes(
        5120, 12288, 60, 128, 128, 102400, moe_intermediate_size=1536, n_group=8, n_routed_experts=160,
        routed_scaling_factor=16.0, topk_group=3, topk_method="group_limited_greedy"),
    "deepseek-v3": V3,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_fields_say_what_the_zoo_says(name):
    fields = PUBLISHED[name]
    config, ours = family_of(fields["model_type"]).config(fields), archlab.get_config(name)
    assert settled(config) == settled(ours)
    again, written = describe(ours)
    assert fields["model_type"] in again.model_types and settled(again.config(written)) == settled(ours)


@pytest.mark.parametrize("fields, parameters", [
    (MIXTRAL | sizes(4096, 14336, 32, 32, 8, 32000), 46702792704), (QWEN2, 14315784192), (OLMOE, 6919161856),
    (GRANITE, 1334628352), (GRANITE | dict(model_type="granitemoeshared", shared_intermediate_size=1024), 1410125824),
    (DBRX, 131596523520), (SWITCH | dict(num_experts=8), 619339008),
], ids=lambda value: value["model_type"] if isinstance(value, dict) else "")
def test_size(fields, parameters):
    assert count_parameters(family_of(fields["model_type"]).config(fields)).total == parameters


@pytest.mark.parametrize("fields, sparse, windows", [
    (QWEN2 | dict(decoder_sparse_step=3), [2, 5], [None] * 6),
    (QWEN2 | dict(decoder_sparse_step=2, mlp_only_layers=[1], use_sliding_window=True, sliding_window=5,
                  max_window_layers=3), [3, 5], [5, None, 5, None, None, None]),
    (QWEN3 | dict(decoder_sparse_step=2, mlp_only_layers=[0, 5], moe_intermediate_size=8), [1, 3], [None] * 6),
    (QWEN3 | dict(use_sliding_window=True, sliding_window=7, moe_intermediate_size=8), [0, 1, 2, 3, 4, 5], [7] * 6),
])
def test_layers_of_qwen(fields, sparse, windows):
    """Which have experts, and which a window."""
    config = family_of(fields["model_type"]).config(fields | sizes(32, 24, 6, 4, 2, 64))
    assert [i for i, layer in enumerate(feed_forwards(config)) if each(layer, MoE)] == sparse
    assert [attention.window for attention in each(config, Attention)] == windows


@pytest.mark.parametrize("layers, experts, sparse", [
    (12, 3, [1, 5, 9]), (12, 6, [1, 3, 5, 7, 9, 11]), (3, 2, [0, 1, 2]), (4, 0, [1]), (1, 0, [0]), (2, 3, [])])
def test_layers_of_switch_transformers(layers, experts, sparse):
    """They follow from the number that is said, which is not always theirs."""
    fields = SWITCH | dict(num_layers=layers, num_sparse_encoder_layers=experts, num_experts=4)
    config = family_of("switch_transformers").config(fields)
    blocks = each(config.encoder, Attention | MoE | MLP)
    assert [i for i, layer in enumerate(blocks[1::2]) if isinstance(layer, MoE)] == sparse
    assert settled(family_of("switch_transformers").config(describe(config)[1])) == settled(config)


@pytest.mark.parametrize("fields, words", [
    (MIXTRAL | dict(num_experts_per_tok=9), "k = 9: must be at most the number of experts, 8"),
    (MIXTRAL | dict(num_experts_per_tok=1), "k = 1 wants False"),
    (QWEN2 | dict(num_experts=0), "num_experts = 0: must be a number above 0"),
    (QWEN2 | dict(decoder_sparse_step=0), "decoder_sparse_step = 0: must be a number above 0"),
    (QWEN2 | dict(layer_types=["sliding_attention"] * 24), "use_sliding_window is false"),
    (QWEN3 | dict(shared_expert_intermediate_size=8), "shared_expert_intermediate_size = 8 is not understood"),
    (OLMOE | dict(sliding_window=7), "sliding_window = 7 is not supported"),
    (OLMOE | dict(head_dim=64), "head_dim = 64 is not supported; 128 is"),
    (GRANITE | dict(mlp_bias=True), "mlp_bias = True is not supported"),
    (GRANITE | dict(shared_intermediate_size=8), "shared_intermediate_size = 8 is not understood"),
    (DBRX | dict(num_key_value_heads=4), "num_key_value_heads = 4 is not supported; 8 is"),
    (DBRX | dict(tie_word_embeddings=True), "tie_word_embeddings = True is not supported"),
    (dbrx(moe_normalize_expert_weights=2), "ffn_config.moe_normalize_expert_weights = 2.0 is not supported"),
    (dbrx(uniform_expert_assignment=True), "ffn_config.uniform_expert_assignment = True is not supported"),
    (dbrx(ffn_act_fn=dict(name="silu", inplace=True)), "ffn_config.ffn_act_fn.inplace = True is not understood"),
    (SWITCH | dict(router_type="experts_masked"), "router_type = 'experts_masked' is not supported"),
    (SWITCH | dict(feed_forward_proj="gated-gelu"), "feed_forward_proj = 'gated-gelu' is not supported"),
    (SWITCH | dict(is_gated_act=True), "is_gated_act = True is not supported"),
    (V3 | dict(quantization_config=dict(quant_method="fp8", weight_block_size=[128, 128])),
     "quantization_config = .*only gpt-oss's MXFP4 is read"),
    (V3 | dict(num_key_value_heads=8), "num_key_value_heads = 8 is not supported"),
    (V3 | dict(moe_layer_freq=2), "moe_layer_freq = 2 is not supported"),
    (V3 | dict(topk_method="greedy"), "topk_method = 'greedy' is not supported"),
    (V3 | dict(n_group=7), "count = 7 must divide the number of experts, 256"),
    (V3 | dict(head_dim=128), "head_dim = 128 is not supported; 64"),
    (PUBLISHED["deepseek-v2"] | dict(norm_topk_prob=True), "norm_topk_prob = True is not supported"),
    (PUBLISHED["deepseek-v2"] | dict(mlp_bias=True), "mlp_bias = True is not supported"),
    (PUBLISHED["deepseek-v2"] | dict(scoring_func="sigmoid"), "scoring_func = 'sigmoid' is not supported"),
    (PUBLISHED["gpt-oss-20b"] | dict(hidden_act="gelu"), "hidden_act = 'gelu' is not supported"),
    (PUBLISHED["gpt-oss-20b"] | dict(quantization_config=dict(quant_method="fp8")), "quant_method = 'fp8'"),
    (llama4(attention_chunk_size=None), "attention_chunk_size = null is not supported"),
    (llama4(no_rope_layers=[1, 0]), "no_rope_layers = .* must be 48 numbers"),
    (llama4(layer_types=["sliding_attention"] * 48), "layer_types = .*chunked_attention"),
    (llama4(for_llm_compressor=True), "text_config.for_llm_compressor = True is not supported"),
    (llama4(new_trick=3), "text_config.new_trick = 3 is not understood"),
])
def test_what_cannot_be_computed_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        family_of(fields["model_type"]).config(fields)


def test_gpt_oss_stretches_its_positions_where_nothing_is_said():
    """Files that say nothing have YaRN; those that say a plain rope have that."""
    silent = {name: value for name, value in PUBLISHED["gpt-oss-20b"].items() if not name.startswith("rope_")}
    family = family_of("gpt_oss")
    assert settled(family.config(silent)) == settled(archlab.get_config("gpt-oss-20b"))
    plain = family.config(silent | {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}})
    assert settled(plain) != settled(family.config(silent))
