"""The fixtures of recurrent families; written by make_fixtures. Nothing in them is at its default, so that no default
hides a missing term."""

from tests.hub.mixtures import IDS

MAMBA = IDS | dict(hidden_size=16, state_size=5, num_hidden_layers=2, expand=2, conv_kernel=3, layer_norm_epsilon=3e-3)
MAMBA2 = MAMBA | dict(head_dim=4, num_heads=8, n_groups=2, chunk_size=8)
RWKV = IDS | dict(hidden_size=16, layer_norm_epsilon=3e-3, num_hidden_layers=2, context_length=64, rescale_every=0)

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
}
