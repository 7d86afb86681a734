"""The fields that well-known recurrent checkpoints have in config.json, and their published sizes; what is refused."""

import pytest

import archlab
from archlab.analysis.accounts import count_parameters
from archlab.hub.family import family_of, settled

ANYWHERE = dict(architectures=["..."], torch_dtype="float32", transformers_version="4.40.0.dev0", use_cache=True,
                pad_token_id=0)
GEMMA = ANYWHERE | dict(
    model_type="recurrent_gemma", _block_types=["recurrent", "recurrent", "attention"], attention_bias=False,
    attention_dropout=0.0, attention_window_size=2048, bos_token_id=2, conv1d_width=4, eos_token_id=1, head_dim=256,
    embeddings_scale_by_sqrt_dim=True, hidden_activation="gelu_pytorch_tanh", logits_soft_cap=30.0,
    num_key_value_heads=1, partial_rotary_factor=0.5, rms_norm_eps=1e-6, rope_theta=10000.0, vocab_size=256000,
    w_init_variance_scale=0.01)
XLSTM = ANYWHERE | dict(
    model_type="xlstm", add_out_norm=True, autocast_kernel_dtype="bfloat16", chunk_size=64,
    chunkwise_kernel="chunkwise--triton_xl_chunk", embedding_dim=4096, eps=1e-6, ffn_proj_factor=2.667,
    ffn_round_up_to_multiple_of=64, gate_soft_cap=15.0, head_dim=512, inference_state_dtype="float32",
    mlstm_round_up_to_multiple_of=64, mode="inference", norm_eps=1e-6, norm_reduction_force_float32=True,
    num_blocks=32, num_heads=8, output_logit_soft_cap=30.0, qk_dim_factor=0.5, return_last_states=True,
    sequence_kernel="native_sequence__triton", step_kernel="triton", tie_word_embeddings=False, use_bias=False,
    v_dim_factor=1.0, vocab_size=50304, weight_mode="single")
PUBLISHED = {  # name in the zoo: (fields of its config.json, parameters)
    "recurrentgemma-2b": (GEMMA | dict(
        hidden_size=2560, intermediate_size=15360, lru_width=2560, num_attention_heads=10, num_hidden_layers=26,
        final_w_init_variance_scale=2 / 26), 2_682_862_080),
    "recurrentgemma-9b": (GEMMA | dict(
        hidden_size=4096, intermediate_size=24576, lru_width=4096, num_attention_heads=16, num_hidden_layers=38,
        final_w_init_variance_scale=2 / 38), 8_579_977_216),
    "xlstm-7b": (XLSTM, 6_865_424_896),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_fields_are_read(name):
    fields, total = PUBLISHED[name]
    config = family_of(fields["model_type"]).config(fields)
    assert count_parameters(config).total == total
    assert settled(config) == settled(archlab.get_config(name))


@pytest.mark.parametrize("fields, words", [
    (GEMMA | dict(hidden_activation="gelu"), "hidden_activation = 'gelu' is not supported"),
    (GEMMA | dict(_block_types=["recurrent", "mamba"]), "block_types = .*mamba"),
    (GEMMA | dict(head_dim=64), "head_dim = 64 is not supported"),
    (GEMMA | dict(embeddings_scale_by_sqrt_dim=False), "embeddings_scale_by_sqrt_dim = False is not supported"),
    (XLSTM | dict(weight_mode="fused"), "weight_mode = 'fused' is not supported"),
    (XLSTM | dict(use_bias=True), "use_bias = True is not supported"),
    (XLSTM | dict(embedding_dim=2048), "embedding_dim = 2048 is not supported"),
    (XLSTM | dict(add_qk_norm=True), "add_qk_norm = True is not supported"),
    (XLSTM | dict(num_heads=7), "MLSTMLarge.keys = 0.5: gives 2048 channels"),
])
def test_what_cannot_be_computed_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        family_of(fields["model_type"]).config(fields)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "xlstm"])
def test_a_file_that_says_nothing_is_read(model_type):
    family = family_of(model_type)
    assert family.config({"model_type": model_type}).width == family.defaults["hidden_size"]
