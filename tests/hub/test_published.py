"""The fields that well-known checkpoints have in config.json are read, and give models of the published sizes."""

import pytest

from archlab.analysis.accounts import count_parameters
from archlab.attention.attention import Attention
from archlab.hub.family import each, family_of

# What every file has and no network depends on.
ANYWHERE = dict(architectures=["..."], attention_dropout=0.0, bos_token_id=1, eos_token_id=[1, 106], use_cache=True,
                initializer_range=0.02, torch_dtype="bfloat16", transformers_version="4.42.4")


def sizes(hidden, intermediate, layers, heads, kv_heads, vocab, **more):
    return dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, vocab_size=vocab, **more)


MISTRAL = dict(model_type="mistral", hidden_act="silu", max_position_embeddings=32768, rms_norm_eps=1e-5,
               tie_word_embeddings=False)
QWEN = dict(hidden_act="silu", max_position_embeddings=40960, max_window_layers=28, rms_norm_eps=1e-6,
            rope_theta=1000000.0, use_sliding_window=False)
OLMO = dict(attention_bias=False, hidden_act="silu", max_position_embeddings=4096, pad_token_id=1, rope_scaling=None)
GEMMA = dict(attention_bias=False, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", head_dim=256,
             max_position_embeddings=8192, pad_token_id=0, rms_norm_eps=1e-6, rope_theta=10000.0)
GEMMA2 = GEMMA | dict(model_type="gemma2", attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
                      cache_implementation="hybrid", sliding_window=4096, sliding_window_size=4096)
GEMMA3 = dict(model_type="gemma3_text", attention_bias=False, attn_logit_softcapping=None, final_logit_softcapping=None,
              cache_implementation="hybrid", head_dim=256, hidden_activation="gelu_pytorch_tanh", pad_token_id=0,
              max_position_embeddings=32768, query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_local_base_freq=10000,
              rope_scaling=None, rope_theta=1000000, sliding_window=512)
PHI3 = dict(model_type="phi3", attention_bias=False, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
            embd_pdrop=0.0, resid_pdrop=0.0, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0,
            max_position_embeddings=131072, original_max_position_embeddings=4096, pad_token_id=32000,
            sliding_window=262144)
GRANITE = dict(model_type="granite", attention_bias=False, attention_multiplier=0.015625, embedding_multiplier=12.0,
               hidden_act="silu", max_position_embeddings=131072, mlp_bias=False, residual_multiplier=0.22,
               rms_norm_eps=1e-5, rope_scaling=None, rope_theta=5000000.0, tie_word_embeddings=True)


def longrope(pairs):
    return dict(rope_scaling={"type": "longrope", "short_factor": [1.0] * pairs, "long_factor": [1.5] * pairs})


PUBLISHED = {  # name: (fields of its config.json, parameters)
    "Mistral-7B-v0.1": (MISTRAL | sizes(4096, 14336, 32, 32, 8, 32000, rope_theta=1e4, sliding_window=4096),
                        7241732096),
    "Mistral-7B-v0.3": (MISTRAL | sizes(4096, 14336, 32, 32, 8, 32768, rope_theta=1e6, sliding_window=None),
                        7248023552),
    "Mistral-Nemo-Base-2407": (MISTRAL | sizes(5120, 14336, 40, 32, 8, 131072, rope_theta=1e6, sliding_window=None,
                                               head_dim=128), 12247782400),
    "Qwen2.5-0.5B": (QWEN | sizes(896, 4864, 24, 14, 2, 151936, model_type="qwen2", sliding_window=32768,
                                  tie_word_embeddings=True, use_mrope=False), 494032768),
    "Qwen2.5-7B": (QWEN | sizes(3584, 18944, 28, 28, 4, 152064, model_type="qwen2", sliding_window=131072,
                                tie_word_embeddings=False, use_mrope=False), 7615616512),
    "Qwen3-0.6B": (QWEN | sizes(1024, 3072, 28, 16, 8, 151936, model_type="qwen3", head_dim=128, sliding_window=None,
                                attention_bias=False, rope_scaling=None, tie_word_embeddings=True), 596049920),
    "Qwen3-8B": (QWEN | sizes(4096, 12288, 36, 32, 8, 151936, model_type="qwen3", head_dim=128, sliding_window=None,
                              attention_bias=False, rope_scaling=None, tie_word_embeddings=False), 8190735360),
    "OLMo-1B-hf": (OLMO | sizes(2048, 8192, 16, 16, 16, 50304, model_type="olmo", clip_qkv=None, pretraining_tp=1,
                                rope_theta=10000.0, tie_word_embeddings=True), 1176764416),
    "OLMo-2-1124-7B": (OLMO | sizes(4096, 11008, 32, 32, 32, 100352, model_type="olmo2", rms_norm_eps=1e-6,
                                    rope_theta=500000, tie_word_embeddings=False), 7298617344),
    "OLMo-2-0425-1B": (OLMO | sizes(2048, 8192, 16, 16, 16, 100352, model_type="olmo2", rms_norm_eps=1e-6,
                                    rope_theta=500000, tie_word_embeddings=False), 1484916736),
    "Olmo-3-1025-7B": (OLMO | sizes(
        4096, 11008, 32, 32, 32, 100278, model_type="olmo3", rms_norm_eps=1e-6, rope_theta=500000, sliding_window=4096,
        tie_word_embeddings=False, layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8, rope_scaling={
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
            "original_max_position_embeddings": 8192, "rope_type": "yarn"}), 7298011136),
    "gemma-2b": (GEMMA | sizes(2048, 16384, 18, 8, 1, 256000, model_type="gemma", hidden_act="gelu"), 2506172416),
    "gemma-7b": (GEMMA | sizes(3072, 24576, 28, 16, 16, 256000, model_type="gemma", hidden_activation=None),
                 8537680896),
    "gemma-2-2b": (GEMMA2 | sizes(2304, 9216, 26, 8, 4, 256000, query_pre_attn_scalar=256), 2614341888),
    "gemma-2-9b": (GEMMA2 | sizes(3584, 14336, 42, 16, 8, 256000, query_pre_attn_scalar=256), 9241705984),
    "gemma-2-27b": (GEMMA2 | sizes(4608, 36864, 46, 32, 16, 256000, query_pre_attn_scalar=144, head_dim=128),
                    27227128320),
    "gemma-3-1b-pt": (GEMMA3 | sizes(1152, 6912, 26, 4, 1, 262144, sliding_window_pattern=6), 999885952),
    "gemma-3-270m": (GEMMA3 | sizes(
        640, 2048, 18, 4, 1, 262144, _sliding_window_pattern=6, use_bidirectional_attention=False,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3), 268098176),
    "Phi-3-mini-128k-instruct": (PHI3 | longrope(48) | sizes(3072, 8192, 32, 32, 32, 32064, tie_word_embeddings=False),
                                 3821079552),
    "phi-4": (PHI3 | sizes(5120, 17920, 40, 40, 10, 100352, original_max_position_embeddings=16384, rope_scaling=None,
                           max_position_embeddings=16384, rope_theta=250000, sliding_window=None), 14659507200),
    "Phi-4-mini-instruct": (PHI3 | longrope(48) | sizes(
        3072, 8192, 32, 24, 8, 200064, partial_rotary_factor=0.75, tie_word_embeddings=True, full_attn_mod=1,
        interpolate_factor=1, lm_head_bias=False, mlp_bias=False), 3836021760),
    "granite-3.1-2b-base": (GRANITE | sizes(2048, 8192, 40, 32, 8, 49155, logits_scaling=8.0), 2533531648),
    "SmolLM3-3B": (sizes(
        2048, 11008, 36, 16, 4, 128256, model_type="smollm3", attention_bias=False, hidden_act="silu", mlp_bias=False,
        layer_types=["full_attention"] * 36, max_position_embeddings=65536, max_window_layers=28, pretraining_tp=2,
        no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, rms_norm_eps=1e-6, rope_scaling=None,
        rope_theta=5000000.0, sliding_window=None, use_sliding_window=False), 3075098624),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_size(name):
    fields, parameters = PUBLISHED[name]
    assert count_parameters(family_of(fields["model_type"]).config(ANYWHERE | fields)).total == parameters


FULL, SLIDING = "full_attention", "sliding_attention"
UNWINDOWED = sizes(32, 36, 6, 4, 2, 64, head_dim=8)
SMALL = UNWINDOWED | dict(sliding_window=5)


@pytest.mark.parametrize("fields, expected", [
    ({"model_type": "mistral"}, [5] * 6),
    ({"model_type": "mistral", "sliding_window": None}, [None] * 6),
    ({"model_type": "mistral", "layer_types": [FULL, SLIDING] * 3}, [None, 5] * 3),
    ({"model_type": "qwen2", "max_window_layers": 2}, [None] * 6),
    ({"model_type": "qwen2", "max_window_layers": 2, "use_sliding_window": True}, [None] * 2 + [5] * 4),
    ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": [SLIDING] + [FULL] * 5}, [5] + [None] * 5),
    ({"model_type": "olmo3"}, [5, 5, 5, None, 5, 5]),
    ({"model_type": "gemma2"}, [5, None] * 3),
    ({"model_type": "gemma3_text"}, [5] * 5 + [None]),
    ({"model_type": "gemma3_text", "sliding_window_pattern": 2}, [5, None] * 3),
    ({"model_type": "phi3"}, [5] * 6),
    ({"model_type": "smollm3"}, [None] * 6),
    ({"model_type": "smollm3", "use_sliding_window": True, "no_rope_layer_interval": 3}, [None, None, 5] * 2),
])
def test_windows(fields, expected):
    config = family_of(fields["model_type"]).config(SMALL | fields)
    assert [attention.window for attention in each(config, Attention)] == expected


def test_positions_of_full_and_of_sliding_layers_in_the_older_spelling():
    stretched = {"rope_theta": 700.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    for model_type, local, base in (("gemma3_text", {"rope_local_base_freq": 90.0}, 90.0), ("olmo3", {}, 500000.0)):
        attentions = each(family_of(model_type).config(SMALL | stretched | local), Attention)
        for attention in attentions:
            found = attention.positions.base, attention.positions.scaling is None
            assert found == ((700.0, False) if attention.window is None else (base, True))


@pytest.mark.parametrize("fields, words", [
    ({"model_type": "mistral", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    ({"model_type": "qwen2", "use_mrope": True}, "use_mrope = True is not supported"),
    ({"model_type": "qwen2", "dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
    ({"model_type": "qwen3", "layer_types": [SLIDING] * 6}, "use_sliding_window is false"),
    ({"model_type": "olmo3", "layer_types": [FULL]}, "layer_types = .* must be 6 times"),
    ({"model_type": "olmo3", "rope_parameters": {"rope_theta": 100.0}}, "rope_parameters.rope_theta = 100.0"),
    ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 6}, "layer_types = .*chunked_attention"),
    ({"model_type": "gemma2", "sliding_window_size": 7}, "sliding_window_size = 7 is not supported"),
    ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0: must"),
    ({"model_type": "gemma3_text", "sliding_window_pattern": None}, "sliding_window_pattern = None: must"),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "LinearScaling"),
    ({"model_type": "phi3", "attention_bias": True}, "attention_bias = True"),
    ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling = 0.0: must be a number above 0"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers = .* must be 6 numbers"),
])
def test_what_cannot_be_computed_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        family_of(fields["model_type"]).config(UNWINDOWED | fields)
