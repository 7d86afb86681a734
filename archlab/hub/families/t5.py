"""T5 (arXiv:1910.10683), its version 1.1, and mT5 (arXiv:2010.11934): an encoder and a decoder, each with one table of
biases by distance, which lies in its first block."""

from archlab.attention.attention import Attention
from archlab.attention.cross import CrossAttention
from archlab.attention.positions import RelativePositions
from archlab.attention.relative import RelativeBias
from archlab.encoder_decoder import EncoderDecoder
from archlab.hub.decoders import ACTIVATIONS, read_sizes, write_decoder
from archlab.hub.family import Blocks, Family, each
from archlab.layers.mlp import MLP
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import stack
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence

DEFAULTS = dict(hidden_size=512, head_dim=64, num_decoder_layers=None, relative_attention_num_buckets=32,
                relative_attention_max_distance=128, layer_norm_epsilon=1e-6, is_encoder_decoder=True)
OWN = {"t5": dict(vocab_size=32128, d_ff=2048, num_hidden_layers=6, num_attention_heads=8, feed_forward_proj="relu"),
       "mt5": dict(vocab_size=250112, d_ff=1024, num_hidden_layers=8, num_attention_heads=6,
                   feed_forward_proj="gated-gelu")}
SPELLING = dict(hidden_size="d_model", head_dim="d_kv", num_hidden_layers="num_layers", num_attention_heads="num_heads",
                max_position_embeddings="n_positions")
FORMS = {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True)}  # unlike "gelu", its approximation
FORMS |= {gate + theirs: (ours, bool(gate)) for gate in ("", "gated-") for theirs, ours in ACTIVATIONS.items()
          if gate + theirs not in FORMS}

BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
OUTER = {"embed/table": "shared.weight", "head/weight": "lm_head.weight",
         "encoder/layers/0/table": f"encoder.{BIAS}", "body/layers/0/table": f"decoder.{BIAS}",
         "{encoder_norm,norm}/scale": "{encoder,decoder}.final_layer_norm.weight"}


def attentions(*parts: str) -> dict:
    """The tensors of a block's attention layers of these names, and of the norms of all its layers."""
    table = {f"layers/{i}/layer/{{query,key,value,out}}": f"layer.{i}.{part}.{{q,k,v,o}}.weight"
             for i, part in enumerate(parts)}
    return table | {f"layers/{i}/before/scale": f"layer.{i}.layer_norm.weight" for i in range(len(parts) + 1)}


SELF, BOTH = attentions("SelfAttention"), attentions("SelfAttention", "EncDecAttention")


def names(table: dict, i: int):
    """A function from the config to the tensors of a block whose layer `i` is an MLP."""
    def of(config):
        hidden = {"{gate,up}": "wi_{0,1}"} if each(config, MLP)[0].gated else {"up": "wi"}
        return table | {f"layers/{i}/layer/{ours}": f"layer.{i}.DenseReluDense.{name}.weight"
                        for ours, name in (hidden | {"down": "wo"}).items()}

    return of


ENCODER = Blocks(names(SELF, 1), "encoder.block.{i}.", "encoder")
DECODER = Blocks(names(BOTH, 2), "decoder.block.{i}.")


def read(f):
    kind = f.take("model_type")
    f.defaults = DEFAULTS | OWN[kind]
    activation, gated = f.choose("feed_forward_proj", FORMS)
    f.only("is_gated_act", gated, default=gated)
    f.take("dense_act_fn", None)  # follows from the form
    mlp, layers = MLP(f.take("d_ff"), activation, gated), f.take("num_hidden_layers")
    scaled = f.take("scale_decoder_outputs", f.take("tie_word_embeddings", True)) and kind == "t5"
    return read_sides(f, [mlp] * layers, [mlp] * (f.take("num_decoder_layers") or layers), scaled)


def read_sides(f, encoder: list, decoder: list, scaled: bool) -> EncoderDecoder:
    """The model whose blocks end with these layers, one each. scaled: whether what the head reads is."""
    f.only("is_encoder_decoder", True)
    f.take("max_position_embeddings", None)  # of the texts it was trained on
    sizes, norm, width = read_sizes(f), RMSNorm(f.take("layer_norm_epsilon")), f.take("hidden_size")
    branch = lambda layer: Residual(layer, norm)

    def side(layers, causal):
        table = RelativeBias(sizes["heads"], f.take("relative_attention_num_buckets"),
                             f.take("relative_attention_max_distance"), causal)
        attend = branch(Attention(**sizes, positions=RelativePositions(), causal=causal, scale=1.0))
        look = [branch(CrossAttention(**sizes, scale=1.0))] if causal else []
        return Sequence(table, *stack([Sequence(attend, *look, branch(layer)) for layer in layers])[0].layers)

    start = f.take("decoder_start_token_id", 0)
    if start is None:
        f.refuse("decoder_start_token_id = null is not supported; a token is")
    return EncoderDecoder(f.take("vocab_size"), width, side(decoder, True), norm, f.take("tie_word_embeddings", True),
                          logit_scale=width**-0.5 if scaled else 1.0, encoder=side(encoder, False), encoder_norm=norm,
                          start=start or 0)


def write(config):
    mlp = each(config, MLP)[0]
    return {**write_sides(config), "d_ff": mlp.hidden,
            "feed_forward_proj": next(name for name, form in FORMS.items() if form == (mlp.activation, mlp.gated)),
            "scale_decoder_outputs": config.logit_scale != 1.0}


def write_sides(config):
    """The inverse of `read_sides`."""
    encoder, table = each(config.encoder, Attention), each(config, RelativeBias)[0]
    size = encoder[0].head_size or config.width // encoder[0].heads
    return {**write_decoder(config), "head_dim": size, "num_attention_heads": encoder[0].heads,
            "num_hidden_layers": len(encoder), "num_decoder_layers": len(each(config.body, Attention)),
            "relative_attention_num_buckets": table.buckets, "relative_attention_max_distance": table.max_distance,
            "layer_norm_epsilon": config.norm.eps, "is_encoder_decoder": True, "decoder_start_token_id": config.start}


FAMILY = Family(("t5", "mt5"), "T5ForConditionalGeneration", DEFAULTS, read, write, OUTER, (ENCODER, DECODER),
                spelling=SPELLING, base="", copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
                buffers=("*.EncDecAttention.relative_attention_bias.weight",))
