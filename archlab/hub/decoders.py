"""What most decoders of the hub share: the pieces of Llama's config.json and the names of its tensors.

Each `read_...` has a `write_...` that is its inverse. A family takes those that fit and adds what is its own.
"""

from collections.abc import Callable

from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.hub.family import each
from archlab.hub.fields import Fields
from archlab.hub.rope import FULL, SLIDING, read_rotary, write_rotary, write_rotary_by_type
from archlab.layers.config import LayerConfig
from archlab.layers.mlp import MLP
from archlab.layers.repeat import stack
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2"}

OUTER = {"embed/table": "model.embed_tokens.weight", "norm/{scale,bias}": "model.norm.{weight,bias}",
         "head/weight": "lm_head.weight", "head_bias": "lm_head.bias"}
ATTENTION = {"layers/0/layer/{query,key,value,out}{,_bias}": "self_attn.{q,k,v,o}_proj.{weight,bias}",
             "layers/0/layer/{query,key}_norm/{scale,bias}": "self_attn.{q,k}_norm.{weight,bias}"}
MLP_NAMES = {"layers/1/layer/{gate,up,down}{,_bias}": "mlp.{gate,up,down}_proj.{weight,bias}"}
PRE_NORMS = {"layers/0/before/{scale,bias}": "input_layernorm.{weight,bias}",
             "layers/1/before/{scale,bias}": "post_attention_layernorm.{weight,bias}"}
BLOCK = ATTENTION | MLP_NAMES | PRE_NORMS
SANDWICH = ATTENTION | MLP_NAMES | {  # norms around the branches (Gemma 2), or only after them (OLMo 2)
    "layers/0/{before,after}/scale": "{input,post_attention}_layernorm.weight",
    "layers/1/{before,after}/scale": "{pre,post}_feedforward_layernorm.weight"}


def read_sizes(f: Fields) -> dict:
    """heads, kv_heads and head_size of `Attention`."""
    heads, width, size = f.positive("num_attention_heads"), f.positive("hidden_size"), f.whole("head_dim")
    if not size and width % heads:
        f.refuse(f"num_attention_heads = {heads}: must divide the width {width}")
    return {"heads": heads, "kv_heads": f.whole("num_key_value_heads") or heads,
            "head_size": size or width // heads}


def read_attention(f: Fields, **fields) -> Attention:
    """Attention with rotary positions; `fields` are more of `Attention`'s, `positions` among them or not."""
    sizes = read_sizes(f)
    positions = fields.pop("positions") if "positions" in fields else read_rotary(f, sizes["head_size"])
    return Attention(**sizes, positions=positions, **fields)


def write_sizes(config: LanguageModel) -> dict:
    attentions = each(config, Attention)
    first = attentions[0]
    return {"num_attention_heads": first.heads, "num_key_value_heads": first.kv_heads or first.heads,
            "head_dim": first.head_size or config.width // first.heads, "num_hidden_layers": len(attentions)}


def write_attention(config: LanguageModel, partial: bool = False) -> dict:
    """partial: as in `write_rotary`."""
    sizes = write_sizes(config)
    rotary = next((a.positions for a in each(config, Attention) if isinstance(a.positions, Rotary)), None)
    return {**sizes, **(write_rotary(rotary, sizes["head_dim"], partial) if rotary else {})}


def read_windows(f: Fields, slides: Callable[[int], bool]) -> list[int | None]:
    """The window of each layer, None where it sees everything. slides: whether layer i has `sliding_window`, where
    `layer_types` is not written."""
    layers, window = f.take("num_hidden_layers"), f.take("sliding_window", 4096)
    types = f.take("layer_types", None) or [SLIDING if window and slides(i) else FULL for i in range(layers)]
    if len(types) != layers or not set(types) <= {FULL, SLIDING}:
        f.refuse(f"layer_types = {types}: must be {layers} times {FULL!r} or {SLIDING!r}, one for each layer")
    elif SLIDING in types and not window:
        f.refuse(f"layer_types has layers that slide, and sliding_window = {window}")
    return [window if kind == SLIDING else None for kind in types]


def write_windows(config: LanguageModel) -> dict:
    windows = [attention.window for attention in each(config, Attention)]
    types = [FULL if window is None else SLIDING for window in windows]
    used = {} if SLIDING not in types else {"sliding_window": windows[types.index(SLIDING)]}
    return {"layer_types": types, **used}


def write_attention_by_type(config: LanguageModel) -> dict:
    """For families whose full and sliding layers have positions of their own."""
    sizes = write_sizes(config)
    positions = {FULL if a.window is None else SLIDING: a.positions for a in each(config, Attention)}
    return {**sizes, **write_windows(config), **write_rotary_by_type(positions, sizes["head_dim"])}


def read_mlp(f: Fields, gated: bool = True, bias: bool = False, activation: str = "hidden_act") -> MLP:
    """activation: the name of its field."""
    return MLP(f.take("intermediate_size"), f.choose(activation, ACTIVATIONS), gated, bias)


def write_mlp(config: LanguageModel, activation: str = "hidden_act") -> dict:
    mlp = each(config, MLP)[0]
    return {"intermediate_size": mlp.hidden, activation: write_activation(mlp)}


def write_activation(mlp: MLP) -> str:
    """The name in transformers of an activation."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == mlp.activation)


def read_decoder(f: Fields, blocks: list[LayerConfig], norm: LayerConfig, before: tuple = (),
                 **fields) -> LanguageModel:
    """The model of these blocks. before: layers that come first. fields: more of `LanguageModel`'s."""
    body = Sequence(*before, *stack(blocks)[0].layers)
    vocab, width, tied = f.take("vocab_size"), f.take("hidden_size"), f.take("tie_word_embeddings")
    return LanguageModel(vocab, width, body, norm, tied, **fields)


def write_decoder(config: LanguageModel) -> dict:
    """Special tokens are null: the model does not know them, and those that families assume may lie outside its
    vocabulary."""
    return {"vocab_size": config.vocab, "hidden_size": config.width, "tie_word_embeddings": config.tied,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
