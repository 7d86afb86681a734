"""BART (arXiv:1910.13461): an encoder and a decoder with norms after the branches and learned positions."""

import math

from archlab.attention.attention import Attention
from archlab.attention.cross import CrossAttention
from archlab.encoder_decoder import EncoderDecoder
from archlab.hub.decoders import ACTIVATIONS, write_activation, write_decoder
from archlab.hub.family import Blocks, Family, each
from archlab.hub.layout import Row
from archlab.layers.mlp import MLP
from archlab.layers.norms import LayerNorm, Normalise
from archlab.layers.positions import LearnedPositions
from archlab.layers.repeat import stack
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence

NORM, OFFSET = LayerNorm(1e-5), 2
DEFAULTS = dict(vocab_size=50265, hidden_size=1024, max_position_embeddings=1024, encoder_layers=12,
                encoder_ffn_dim=4096, encoder_attention_heads=16, decoder_layers=12, decoder_ffn_dim=4096,
                decoder_attention_heads=16, activation_function="gelu", scale_embedding=False, is_encoder_decoder=True,
                decoder_start_token_id=2, tie_word_embeddings=True)
FIXED = dict(normalize_before=False, normalize_embedding=True, add_final_layer_norm=False, add_bias_logits=False,
             static_position_embeddings=False, extra_pos_embeddings=OFFSET)
TRAINING = ("activation_dropout", "classif_dropout", "decoder_layerdrop", "encoder_layerdrop",
            "force_bos_token_to_be_generated", "init_std", "num_hidden_layers", "replacing_rate", "save_step",
            "student_decoder_layers", "student_encoder_layers")

OUTER = {"embed/table": "model.shared.weight", "head/weight": "lm_head.weight", "head_bias": Row("final_logits_bias"),
         "{encoder,body}/layers/0/table": "model.{encoder,decoder}.embed_positions.weight",
         "{encoder,body}/layers/1/norm/{scale,bias}": "model.{encoder,decoder}.layernorm_embedding.{weight,bias}"}
ATTENTION = "{query,key,value,out}{,_bias}"
SELF = {f"layers/0/layer/{ATTENTION}": "self_attn.{q_proj,k_proj,v_proj,out_proj}.{weight,bias}",
        "layers/0/outer/{scale,bias}": "self_attn_layer_norm.{weight,bias}"}
CROSS = {f"layers/1/layer/{ATTENTION}": "encoder_attn.{q_proj,k_proj,v_proj,out_proj}.{weight,bias}",
         "layers/1/outer/{scale,bias}": "encoder_attn_layer_norm.{weight,bias}"}
FEED = {"layer/{up,down}{,_bias}": "fc{1,2}.{weight,bias}", "outer/{scale,bias}": "final_layer_norm.{weight,bias}"}
ENCODER = SELF | {f"layers/1/{ours}": name for ours, name in FEED.items()}
DECODER = SELF | CROSS | {f"layers/2/{ours}": name for ours, name in FEED.items()}


def read(f):
    for name, value in FIXED.items():  # written in files, and taken for granted
        f.only(name, value, default=value)
    f.only("is_encoder_decoder", True)
    f.only("tie_word_embeddings", True)  # in others, encoder and decoder have embeddings of their own
    for name in TRAINING:
        f.take(name, None)
    activation, width = f.choose("activation_function", ACTIVATIONS), f.take("hidden_size")
    branch = lambda layer: Residual(layer, before=None, outer=NORM)

    def side(name, causal):
        heads = f.take(f"{name}_attention_heads")
        attend = branch(Attention(heads, positions=None, causal=causal, bias=True, out_bias=True))
        look = [branch(CrossAttention(heads, bias=True, out_bias=True))] if causal else []
        block = Sequence(attend, *look, branch(MLP(f.take(f"{name}_ffn_dim"), activation, bias=True)))
        places = LearnedPositions(f.take("max_position_embeddings"), OFFSET)
        return Sequence(places, Normalise(NORM), *stack([block] * f.take(f"{name}_layers"))[0].layers)

    start = f.take("decoder_start_token_id")
    if start is None:
        f.refuse("decoder_start_token_id = null is not supported; a token is")
    scale = math.sqrt(width) if f.take("scale_embedding") else 1.0
    return EncoderDecoder(f.take("vocab_size"), width, side("decoder", True), None, embedding_scale=scale,
                          head_bias=True, encoder=side("encoder", False), encoder_norm=None,
                          start=start or 0)


def write(config):
    sides = {}
    for name, body in (("encoder", config.encoder), ("decoder", config.body)):
        attentions = each(body, Attention)
        sides |= {f"{name}_layers": len(attentions), f"{name}_attention_heads": attentions[0].heads,
                  f"{name}_ffn_dim": each(body, MLP)[0].hidden}
    return {**write_decoder(config), **sides, "activation_function": write_activation(each(config, MLP)[0]),
            "max_position_embeddings": each(config, LearnedPositions)[0].length, "is_encoder_decoder": True,
            "scale_embedding": config.embedding_scale != 1.0, "decoder_start_token_id": config.start}


FAMILY = Family(("bart",), "BartForConditionalGeneration", DEFAULTS, read, write, OUTER,
                (Blocks(ENCODER, "model.encoder.layers.{i}.", "encoder"), Blocks(DECODER, "model.decoder.layers.{i}.")),
                spelling=dict(hidden_size="d_model"), buffers=("*coder.version",), zeros=("final_logits_bias",),
                copies=("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"))
