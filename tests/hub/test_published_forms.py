"""The fields that well-known checkpoints of other forms than Llama's have in config.json, and their published sizes."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import archlab
from archlab.analysis.accounts import count_parameters
from archlab.hub.family import family_of
from tests.helpers import build
from tests.hub.test_families import FIXTURES

# What every file has and no network depends on.
ANYWHERE = dict(architectures=["..."], bos_token_id=0, eos_token_id=0, use_cache=True, initializer_range=0.02,
                torch_dtype="float16", transformers_version="4.24.0")


def sizes(hidden, intermediate, layers, heads, vocab, **more):
    return dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
                vocab_size=vocab, **more)


BIGCODE = dict(model_type="gpt_bigcode", activation_function="gelu", attention_softmax_in_fp32=True, multi_query=True,
               inference_runner=0, layer_norm_epsilon=1e-5, max_batch_size=None, n_positions=8192, pad_key_length=True,
               pre_allocate_kv_cache=False, scale_attn_weights=True, validate_runner_input=True, vocab_size=49152)
NEOX = dict(model_type="gpt_neox", layer_norm_eps=1e-5, max_position_embeddings=2048, rotary_emb_base=10000,
            rotary_pct=0.25, tie_word_embeddings=False, use_parallel_residual=True)
PHI = dict(model_type="phi", hidden_act="gelu_new", layer_norm_eps=1e-5, qk_layernorm=False, rope_scaling=None,
           rope_theta=10000.0, tie_word_embeddings=False)
FALCON = dict(model_type="falcon", alibi=False, apply_residual_connection_post_layernorm=False, bias=False,
              layer_norm_epsilon=1e-5, multi_query=True, new_decoder_architecture=False, parallel_attn=True,
              vocab_size=65024)
MPT = dict(model_type="mpt", attn_config=dict(
    alibi=True, alibi_bias_max=8, attn_impl="torch", attn_pdrop=0, attn_type="multihead_attention", clip_qkv=None,
    attn_uses_sequence_id=False, prefix_lm=False, qk_ln=False, softmax_scale=None), embedding_fraction=1.0,
    expansion_ratio=4, init_config=dict(name="kaiming_normal_"), init_device="cpu", learned_pos_emb=True,
    logit_scale=None, max_seq_len=2048, no_bias=True, norm_type="low_precision_layernorm", verbose=0, vocab_size=50432)
BLOOM = dict(model_type="bloom", apply_residual_connection_post_layernorm=False, bias_dropout_fusion=True,
             layer_norm_epsilon=1e-5, masked_softmax_fusion=True, n_inner=None, offset_alibi=100, pretraining_tp=1,
             seq_length=2048, skip_bias_add=True, skip_bias_add_qkv=False, unk_token_id=0, vocab_size=250880)
STABLELM = dict(model_type="stablelm", hidden_act="silu", layer_norm_eps=1e-5, partial_rotary_factor=0.25,
                rope_theta=10000, tie_word_embeddings=False)
COHERE = dict(attention_bias=False, hidden_act="silu", layer_norm_eps=1e-5, model_max_length=131072, pad_token_id=0)
STARCODER2 = dict(model_type="starcoder2", activation_function="gelu", hidden_act="gelu_pytorch_tanh",
                  layer_norm_epsilon=1e-5, mlp_type="default", norm_epsilon=1e-5, norm_type="layer_norm",
                  scale_attn_weights=True, sliding_window=4096, use_bias=True)
T5 = dict(model_type="t5", d_kv=64, decoder_start_token_id=0, initializer_factor=1.0, is_encoder_decoder=True,
          layer_norm_epsilon=1e-6, output_past=True, pad_token_id=0, relative_attention_num_buckets=32)
T5_1 = T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
BART = dict(model_type="bart", activation_dropout=0.0, activation_function="gelu", add_final_layer_norm=False,
            classif_dropout=0.0, decoder_layerdrop=0.0, decoder_start_token_id=2, encoder_layerdrop=0.0,
            forced_eos_token_id=2, init_std=0.02, is_encoder_decoder=True, max_position_embeddings=1024,
            normalize_before=False, num_beams=4, scale_embedding=False)

PUBLISHED = {  # name: (fields of its config.json, parameters)
    "starcoderbase-1b": (BIGCODE | dict(n_embd=2048, n_head=16, n_inner=8192, n_layer=24), 1137207296),
    "starcoder": (BIGCODE | dict(n_embd=6144, n_head=48, n_inner=24576, n_layer=40), 15517456384),
    "gpt-j-6b": (dict(model_type="gptj", activation_function="gelu_new", gradient_checkpointing=False, n_embd=4096,
                      layer_norm_epsilon=1e-5, n_head=16, n_inner=None, n_layer=28, n_positions=2048, rotary=True,
                      rotary_dim=64, scale_attn_weights=True, tie_word_embeddings=False, vocab_size=50400), 6050882784),
    "pythia-160m": (NEOX | sizes(768, 3072, 12, 12, 50304, hidden_act="gelu"), 162322944),
    "gpt-neox-20b": (NEOX | sizes(6144, 24576, 44, 64, 50432, hidden_act="gelu_fast"), 20554567680),
    "phi-1_5": (PHI | sizes(2048, 8192, 24, 32, 51200, num_key_value_heads=None, partial_rotary_factor=0.5),
                1418270720),
    "phi-2": (PHI | sizes(2560, 10240, 32, 32, 51200, num_key_value_heads=32, partial_rotary_factor=0.4), 2779683840),
    "falcon-7b": (FALCON | dict(hidden_size=4544, num_attention_heads=71, num_hidden_layers=32), 6921720704),
    "falcon-rw-1b": (FALCON | dict(hidden_size=2048, num_attention_heads=32, num_hidden_layers=24, alibi=True,
                                   bias=True, multi_query=False, parallel_attn=False, vocab_size=50304), 1311625216),
    "falcon-40b": (FALCON | dict(hidden_size=8192, num_attention_heads=128, num_hidden_layers=60, num_kv_heads=8,
                                 new_decoder_architecture=True), 41303293952),
    "falcon-11B": (FALCON | dict(
        activation="gelu", ff_factor=4, ffn_hidden_size=16384, hidden_size=4096, new_decoder_architecture=True,
        num_attention_heads=32, num_hidden_layers=60, num_kv_heads=8, num_ln_in_parallel_attn=1, rope_scaling=None,
        rope_theta=500042.0, tie_word_embeddings=False), 11102822400),
    "mpt-7b": (MPT | dict(d_model=4096, n_heads=32, n_layers=32), 6649286656),
    "bloom-560m": (BLOOM | dict(n_embed=1024, n_layer=24, num_attention_heads=16), 559214592),
    "bloomz-7b1": (BLOOM | dict(hidden_size=4096, n_layer=30, n_head=32, slow_but_exact=False), 7069016064),
    "stablelm-3b-4e1t": (STABLELM | sizes(2560, 6912, 32, 32, 50304, use_qkv_bias=False), 2795443200),
    "stablelm-2-1_6b": (STABLELM | sizes(2048, 5632, 24, 32, 100352, num_key_value_heads=32, use_qkv_bias=True),
                        1644515328),
    "stablelm-2-12b": (STABLELM | sizes(5120, 13824, 40, 32, 100352, num_key_value_heads=8, qk_layernorm=True,
                                        use_parallel_residual=True, use_qkv_bias=False), 12143185920),
    "c4ai-command-r-v01": (COHERE | sizes(8192, 22528, 40, 64, 256000, model_type="cohere", logit_scale=0.0625,
                                          rope_theta=8000000.0, use_qk_norm=False), 34980831232),
    "c4ai-command-r-plus": (COHERE | sizes(12288, 33792, 64, 96, 256000, model_type="cohere", num_key_value_heads=8,
                                           logit_scale=0.8333333333333334, use_qk_norm=True), 103810674688),
    "c4ai-command-r7b-12-2024": (COHERE | sizes(
        4096, 14336, 32, 32, 256000, model_type="cohere2", num_key_value_heads=8, head_dim=128, layer_switch=4,
        logit_scale=0.25, order_of_interleaved_layers="local_attn_first", position_embedding_type="rope_gptj",
        rope_theta=50000, rotary_pct=1.0, sliding_window=4096, sliding_window_pattern=4, use_embedding_sharing=True,
        use_gated_activation=True, use_parallel_block=True, use_parallel_embedding=True), 8028033024),
    "starcoder2-3b": (STARCODER2 | sizes(3072, 12288, 30, 24, 49152, num_key_value_heads=2), 3030371328),
    "t5-small": (T5 | dict(d_model=512, d_ff=2048, num_heads=8, num_layers=6, n_positions=512, vocab_size=32128),
                 60506624),
    "t5-v1_1-small": (T5_1 | dict(d_model=512, d_ff=1024, num_decoder_layers=8, num_heads=6, num_layers=8,
                                  vocab_size=32128), 76961152),
    "flan-t5-base": (T5_1 | dict(d_model=768, d_ff=2048, num_decoder_layers=12, num_heads=12, num_layers=12,
                                 n_positions=512, vocab_size=32128), 247577856),
    "mt5-small": (T5_1 | dict(model_type="mt5", d_model=512, d_ff=1024, num_decoder_layers=8, num_heads=6, num_layers=8,
                              vocab_size=250112), 300176768),
    # with the bias of the head, which is no parameter in transformers
    "bart-base": (BART | dict(
        d_model=768, decoder_attention_heads=12, decoder_ffn_dim=3072, decoder_layers=6, encoder_attention_heads=12,
        encoder_ffn_dim=3072, encoder_layers=6, num_hidden_layers=6, vocab_size=50265), 139420416 + 50265),
    "bart-large": (BART | dict(
        d_model=1024, decoder_attention_heads=16, decoder_ffn_dim=4096, decoder_layers=12, encoder_attention_heads=16,
        encoder_ffn_dim=4096, encoder_layers=12, num_hidden_layers=12, vocab_size=50265), 406291456 + 50265),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_size(name):
    fields, parameters = PUBLISHED[name]
    assert count_parameters(family_of(fields["model_type"]).config(ANYWHERE | fields)).total == parameters


@pytest.mark.parametrize("name, fields, words", [
    ("gpt-j-6b", {"rotary_dim": None}, "rotary_dim = None is not supported"),
    ("gpt-j-6b", {"rotary": False}, "rotary = False is not supported"),
    ("starcoder", {"num_key_value_heads": 4}, "num_key_value_heads = 4 is not supported; 1 is"),
    ("starcoder", {"add_cross_attention": True}, "add_cross_attention = True is not understood"),
    ("pythia-160m", {"num_attention_heads": 7}, "num_attention_heads = 7: must divide the width 768"),
    ("phi-2", {"num_key_value_heads": 5}, r"read:\n  Attention.kv_heads = 5: must divide.*= 32 \(the reading ended"),
    ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2 is not supported"),
    ("falcon-40b", {"parallel_attn": False}, "parallel_attn = False is not supported"),
    ("falcon-rw-1b", {"num_kv_heads": 8}, "num_kv_heads = 8 is not supported; 32 is"),
    ("mpt-7b", {"attn_config": {"alibi_bias_max": 16}}, "attn_config.alibi_bias_max = 16 is not supported; 8 is"),
    ("mpt-7b", {"attn_config": {"rope": True}}, "attn_config.rope = True is not understood"),
    ("bloom-560m", {"n_inner": 7}, "n_inner = 7 is not supported"),
    ("c4ai-command-r-v01", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    ("c4ai-command-r7b-12-2024", {"sliding_window": None}, "sliding_window = null is not supported"),
    ("c4ai-command-r7b-12-2024", {"layer_switch": 3}, "layer_switch = 3 is not supported; 4 is"),
    ("starcoder2-3b", {"mlp_type": "gated"}, "mlp_type = 'gated' is not supported"),
    ("t5-small", {"feed_forward_proj": "gated-mish"}, "feed_forward_proj = 'gated-mish' is not supported"),
    ("t5-small", {"is_gated_act": True}, "is_gated_act = True is not supported"),
    ("bart-base", {"normalize_before": True}, "normalize_before = True is not supported"),
    ("bart-base", {"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
])
def test_what_cannot_be_computed_is_refused(name, fields, words):
    fields = PUBLISHED[name][0] | fields
    with pytest.raises(ValueError, match=words):
        family_of(fields["model_type"]).config(fields)


def stored(folder, name, change):
    """A fixture with other tensors."""
    folder.mkdir()
    (folder / "config.json").write_text((FIXTURES / name / "config.json").read_text())
    save_file(change(load_file(FIXTURES / name / "model.safetensors")), folder / "model.safetensors")
    return folder


def test_an_embedding_that_is_stored_under_the_names_of_its_copies(tmp_path):
    table = archlab.load(FIXTURES / "t5").embed.table
    copies = ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")
    for copy in copies:
        rename = lambda tensors: {name.replace("shared", copy): array for name, array in tensors.items()}
        model = archlab.load(stored(tmp_path / copy, "t5", rename))
        assert model.config.tied
        np.testing.assert_array_equal(model.embed.table, table)
    with pytest.raises(ValueError, match="encoder.embed_tokens.weight differs from shared.weight"):
        archlab.load(stored(tmp_path / "b", "t5", lambda tensors: tensors | {
            "encoder.embed_tokens.weight": tensors["shared.weight"] + 1}))


def test_a_bias_of_the_head_that_is_not_stored_is_zero(tmp_path):
    without = lambda tensors: {name: array for name, array in tensors.items() if name != "final_logits_bias"}
    model = archlab.load(stored(tmp_path / "a", "bart", without))
    np.testing.assert_array_equal(model.head_bias, np.zeros(model.config.vocab))
    archlab.save(model, tmp_path / "b", format="huggingface")
    assert load_file(tmp_path / "b" / "model.safetensors")["final_logits_bias"].shape == (1, model.config.vocab)


@pytest.mark.parametrize("name, model_type", [
    ("pythia-nano", "gpt_neox"), ("bloom-nano", "bloom"), ("command-r7b-nano", "cohere2"), ("t5-nano", "t5"),
    ("mixture-of-experts-nano", "mixtral")])
def test_models_of_the_zoo_are_exported(tmp_path, name, model_type):
    model = build(archlab.get_config(name))
    archlab.save(model, tmp_path, format="huggingface")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model_type
    ids = np.arange(8).reshape(2, 4) + 1

    @jax.jit
    def forward(model):
        return model(ids, memory=model.encode(ids)[0] if name == "t5-nano" else None).logits

    np.testing.assert_allclose(forward(archlab.load(tmp_path)), forward(model), atol=1e-5)
