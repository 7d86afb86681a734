"""RecurrentGemma (arXiv:2404.07839): Griffin's recurrent blocks, and local attention in every third."""

import ml_dtypes
import numpy as np

from archlab.attention.attention import Attention
from archlab.hub.decoders import OUTER as COMMON
from archlab.hub.decoders import read_decoder, write_attention, write_decoder
from archlab.hub.family import Blocks, Family, each
from archlab.hub.layout import Depthwise, InputsFirst
from archlab.hub.rope import read_rotary
from archlab.layers.mlp import MLP, GeGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.recurrence.rg_lru import RGLRU

DEFAULTS = dict(vocab_size=256000, hidden_size=2560, intermediate_size=7680, num_hidden_layers=26,
                num_attention_heads=10, num_key_value_heads=None, lru_width=None, attention_window_size=2048,
                conv1d_width=4, logits_soft_cap=30.0, rms_norm_eps=1e-6, hidden_activation="gelu_pytorch_tanh",
                attention_bias=False, tie_word_embeddings=True)
PATTERN = ["recurrent", "recurrent", "attention"]

OUTER = COMMON | {"norm/{scale,bias}": "model.final_norm.{weight,bias}"}
MIXER, MLP_BLOCK, GATES = "layers/0/layer/", "layers/1/layer/", "temporal_block.rg_lru."
BLOCK = {
    "layers/{0,1}/before/scale": "{temporal,channel}_pre_norm.weight",
    MLP_BLOCK + "{gate,up,down}{,_bias}": "mlp_block.{gate,up,down}_proj.{weight,bias}",
    MIXER + "{query,key,value,out}{,_bias}": "temporal_block.{q,k,v,o}_proj.{weight,bias}",
    MIXER + "{gate,into,merge}{,_bias}": "temporal_block.linear_{y,x,out}.{weight,bias}",
    MIXER + "conv/weight": Depthwise("temporal_block.conv_1d.weight"),
    MIXER + "conv/bias": "temporal_block.conv_1d.bias",
    MIXER + "{read,forget}": InputsFirst(GATES + "{input,recurrent}_gate_weight"),
    MIXER + "{read,forget}_bias": GATES + "{input,recurrent}_gate_bias",
    MIXER + "decay": GATES + "recurrent_param"}


def read(f):
    width, heads, layers = f.positive("hidden_size"), f.positive("num_attention_heads"), f.take("num_hidden_layers")
    size, norm = width // heads, RMSNorm(f.take("rms_norm_eps"), centred=True)
    f.only("head_dim", None, size, default=None)
    f.only("hidden_activation", "gelu_pytorch_tanh")
    f.only("embeddings_scale_by_sqrt_dim", True, default=True)
    for name in ("w_init_variance_scale", "final_w_init_variance_scale"):
        f.take(name, None)  # which say how it was initialised
    recurrent = RGLRU(heads, f.whole("lru_width") or width, f.take("conv1d_width"), "code")
    attention = Attention(heads, f.whole("num_key_value_heads") or heads, size, read_rotary(f, size, share=0.5),
                          f.take("attention_window_size"), bias=f.take("attention_bias"), out_bias=True)
    mlp = Residual(GeGLU(f.take("intermediate_size") // 2, bias=True), norm)  # the number counts gate and up
    pattern = f.take("_block_types", None) or f.take("block_types", None) or PATTERN  # the first files have the first
    if not set(pattern) <= {"recurrent", "attention"}:
        f.refuse(f"block_types = {pattern}: must be 'recurrent' or 'attention', each")
    kinds = [pattern[i % len(pattern)] for i in range(layers)]
    blocks = [Sequence(Residual(recurrent if kind == "recurrent" else attention, norm), mlp) for kind in kinds]
    return read_decoder(f, blocks, norm, embedding_scale=rounded_root(width), logit_cap=f.take("logits_soft_cap"))


def write(config):
    recurrent, hidden = each(config, RGLRU)[0], each(config, MLP)[0].hidden
    kinds = ["recurrent" if isinstance(mixer, RGLRU) else "attention"
             for mixer in each(config, RGLRU | Attention)]
    attentions = each(config, Attention)
    return {**write_decoder(config), **write_attention(config, partial=True), "num_hidden_layers": len(kinds),
            "block_types": kinds, "rms_norm_eps": config.norm.eps, "intermediate_size": 2 * hidden,
            "lru_width": recurrent.channels or config.width, "conv1d_width": recurrent.conv,
            "hidden_activation": "gelu_pytorch_tanh", "attention_window_size": attentions[0].window,
            "attention_bias": attentions[0].bias, "logits_soft_cap": config.logit_cap}


def rounded_root(width: int) -> float:
    """sqrt(D) as the embeddings were scaled by in training: rounded to bfloat16."""
    return float(np.asarray(width**0.5, ml_dtypes.bfloat16))


FAMILY = Family(("recurrent_gemma",), "RecurrentGemmaForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK),))
