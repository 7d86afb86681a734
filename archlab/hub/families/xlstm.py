"""xLSTM 7B (arXiv:2503.13427) and models of its form: mLSTM layers without convolution, each before an MLP."""

from archlab.hub.decoders import read_decoder, write_decoder
from archlab.hub.family import Blocks, Family, each
from archlab.layers.mlp import MLP, SwiGLU
from archlab.layers.norms import LayerNorm, RMSNorm
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.recurrence.mlstm_large import MLSTMLarge

DEFAULTS = dict(vocab_size=50304, hidden_size=4096, num_hidden_layers=32, num_heads=8, use_bias=False,
                tie_word_embeddings=False, add_out_norm=True, norm_eps=1e-6, qk_dim_factor=0.5, v_dim_factor=1.0,
                eps=1e-6, ffn_proj_factor=2.667, ffn_round_up_to_multiple_of=64, gate_soft_cap=15.0,
                output_logit_soft_cap=30.0, weight_mode="single")
# How transformers computes it, not what; and what the published files say to earlier code, and transformers ignores.
INERT = """chunkwise_kernel sequence_kernel step_kernel mode return_last_states autocast_kernel_dtype
    inference_state_dtype max_inference_chunksize norm_reduction_force_float32 add_embedding_dropout
    add_forward_backend_padding forward_backend_name step_backend_name force_bos_token_insert igate_bias_init_range
    mlstm_round_up_to_multiple_of""".split()

OUTER = {"embed/table": "backbone.embeddings.weight", "norm/scale": "backbone.out_norm.weight",
         "head/weight": "lm_head.weight"}
MIXER = "layers/0/layer/"
BLOCK = {
    "layers/{0,1}/before/scale": "norm_{mlstm,ffn}.weight",
    MIXER + "{query,key,value}": "mlstm_layer.{q,k,v}.weight",
    MIXER + "gate": "mlstm_layer.ogate_preact.weight",
    MIXER + "{input,forget}_gate": "mlstm_layer.{i,f}gate_preact.weight",
    MIXER + "{input,forget}_bias": "mlstm_layer.{i,f}gate_preact.bias",
    MIXER + "norm/scale": "mlstm_layer.multihead_norm.weight",
    MIXER + "out": "mlstm_layer.out_proj.weight",
    "layers/1/layer/{gate,up,down}": "ffn.{proj_up_gate,proj_up,proj_down}.weight"}


def read(f):
    for name in INERT:
        f.take(name, None)
    for name, value in (("use_bias", False), ("add_out_norm", True), ("weight_mode", "single"),
                        ("add_post_blocks_norm", True), ("add_post_norm", False), ("add_qk_norm", False),
                        ("tie_word_embeddings", False)):
        f.only(name, value, default=value)
    width, layers, eps = f.take("hidden_size"), f.take("num_hidden_layers"), f.take("norm_eps")
    for name, value in (("embedding_dim", width), ("num_blocks", layers), ("cell_norm_eps", eps)):  # said twice
        f.only(name, None, value, default=None)
    multiple = f.positive("ffn_round_up_to_multiple_of")
    hidden = int((width * f.take("ffn_proj_factor") + multiple - 1) // multiple * multiple)
    mixer = MLSTMLarge(f.take("num_heads"), f.take("qk_dim_factor"), f.take("v_dim_factor"), f.take("gate_soft_cap"),
                       LayerNorm(eps, bias=False), f.take("eps"))
    f.only("head_dim", None, mixer.sizes(width)[1], default=None)
    block = Sequence(Residual(mixer, RMSNorm(eps)), Residual(SwiGLU(hidden), RMSNorm(eps)))
    return read_decoder(f, [block] * layers, RMSNorm(eps), logit_cap=f.take("output_logit_soft_cap"))


def write(config):
    mixers, hidden = each(config, MLSTMLarge), each(config, MLP)[0].hidden
    mixer, layers = mixers[0], len(mixers)
    return {**write_decoder(config), "num_hidden_layers": layers, "num_blocks": layers, "embedding_dim": config.width,
            "num_heads": mixer.heads, "qk_dim_factor": mixer.keys, "v_dim_factor": mixer.values,
            "gate_soft_cap": mixer.gate_cap, "eps": mixer.eps, "norm_eps": config.norm.eps,
            "ffn_proj_factor": hidden / config.width, "ffn_round_up_to_multiple_of": 1,
            "output_logit_soft_cap": config.logit_cap}


FAMILY = Family(("xlstm",), "xLSTMForCausalLM", DEFAULTS, read, write, OUTER,
                (Blocks(BLOCK, "backbone.blocks.{i}."),), base="backbone.")
