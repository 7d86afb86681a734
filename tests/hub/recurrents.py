"""The fixtures of recurrent families; written by make_fixtures. Nothing in them is at its default, so that no default
hides a missing term."""

from tests.hub.mixtures import ABSENT, IDS, rope

MAMBA = IDS | dict(hidden_size=16, state_size=5, num_hidden_layers=2, expand=2, conv_kernel=3, layer_norm_epsilon=3e-3)
MAMBA2 = MAMBA | dict(head_dim=4, num_heads=8, n_groups=2, chunk_size=8)
RWKV = IDS | dict(hidden_size=16, layer_norm_epsilon=3e-3, num_hidden_layers=2, context_length=64, rescale_every=0)
GEMMA = IDS | rope(partial_rotary_factor=0.5) | dict(
    hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=4,
    attention_window_size=5, conv1d_width=3, logits_soft_cap=4.0, rms_norm_eps=3e-3)
XLSTM = IDS | dict(
    hidden_size=24, num_hidden_layers=2, num_heads=2, norm_eps=3e-3, eps=2e-3, ffn_proj_factor=1.3,
    ffn_round_up_to_multiple_of=8, gate_soft_cap=3.0, output_logit_soft_cap=4.0, chunk_size=16,
    autocast_kernel_dtype="float32", return_last_states=False)

RECURRENTS = {  # name: class of the config, and its arguments
    "mamba": ("Mamba", MAMBA),
    "mamba-bias": ("Mamba", MAMBA | dict(use_bias=True, use_conv_bias=False, tie_word_embeddings=False,
                                         time_step_rank=3, expand=3)),
    "falcon_mamba": ("FalconMamba", MAMBA | dict(mixer_rms_eps=2e-3, time_step_rank=3, tie_word_embeddings=False)),
    "mamba2": ("Mamba2", MAMBA2),
    "mamba2-bias": ("Mamba2", MAMBA2 | dict(use_bias=True, use_conv_bias=False, tie_word_embeddings=True, n_groups=1,
                                            time_step_limit=(0.3, 1.1))),
    "rwkv": ("Rwkv", RWKV),
    "rwkv-rescaled": ("Rwkv", RWKV | dict(num_hidden_layers=3, rescale_every=2, layer_norm_epsilon=1e-9,
                                          intermediate_size=24, tie_word_embeddings=True)),
    "recurrent_gemma": ("RecurrentGemma", GEMMA),
    "recurrent_gemma-wide": ("RecurrentGemma", GEMMA | dict(
        lru_width=36, block_types=["attention", "recurrent"], attention_bias=True, num_key_value_heads=3,
        num_hidden_layers=3)),
    "xlstm": ("xLSTM", XLSTM),
    "xlstm-wide": ("xLSTM", XLSTM | dict(qk_dim_factor=1.0, v_dim_factor=1.5, num_heads=3)),
}

RECURRENTS_OLDER = {  # written in the older words too, with these fields beyond the renamings
    "recurrent_gemma": dict(block_types=ABSENT, _block_types=["recurrent", "recurrent", "attention"],
                            embeddings_scale_by_sqrt_dim=True),
    "xlstm": dict(add_embedding_dropout=False, add_forward_backend_padding=False, add_post_blocks_norm=True,
                  add_post_norm=False, add_qk_norm=False, cell_norm_eps=3e-3, force_bos_token_insert=True, head_dim=12,
                  igate_bias_init_range=-10.0, mlstm_round_up_to_multiple_of=64, max_inference_chunksize=ABSENT),
}
