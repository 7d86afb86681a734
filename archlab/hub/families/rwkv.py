"""RWKV-4 (arXiv:2305.13048), as transformers has it.

`rescale_every` is read and forgotten: at inference transformers halves the stream after every so many layers, and
divides by as much what is added to it, against the overflow of float16. Norms take that out again, up to their epsilon.
Exports say 0, which is never.
"""

from archlab.hub.decoders import read_decoder, write_decoder
from archlab.hub.family import Blocks, Family, each
from archlab.hub.layout import Vector
from archlab.layers.norms import LayerNorm, Normalise
from archlab.recurrence.rwkv4 import RWKV4, ChannelMix4
from archlab.zoo.rwkv import block

DEFAULTS = dict(vocab_size=50277, hidden_size=4096, num_hidden_layers=32, attention_hidden_size=None,
                intermediate_size=None, layer_norm_epsilon=1e-5, tie_word_embeddings=False, context_length=1024,
                rescale_every=6)

OUTER = {"embed/table": "rwkv.embeddings.weight",
         "body/layers/0/norm/{scale,bias}": "rwkv.blocks.0.pre_ln.{weight,bias}",
         "norm/{scale,bias}": "rwkv.ln_out.{weight,bias}", "head/weight": "head.weight"}
BLOCK = {"layers/{0,1}/before/{scale,bias}": "ln{1,2}.{weight,bias}",
         "layers/0/layer/{key,value,receptance,out}": "attention.{key,value,receptance,output}.weight",
         "layers/0/layer/{decay,bonus}": "attention.time_{decay,first}",
         "layers/0/layer/mix_{key,value,receptance}": Vector("attention.time_mix_{key,value,receptance}"),
         "layers/1/layer/{key,value,receptance}": "feed_forward.{key,value,receptance}.weight",
         "layers/1/layer/mix_{key,receptance}": Vector("feed_forward.time_mix_{key,receptance}")}


def read(f):
    norm, width = LayerNorm(f.take("layer_norm_epsilon")), f.take("hidden_size")
    f.only("attention_hidden_size", None, width)
    f.take("context_length")  # how long a text its CUDA kernel takes
    f.take("rescale_every")
    one = block(RWKV4(), ChannelMix4(f.take("intermediate_size") or 4 * width), norm)
    # The last norm has an epsilon of its own, whatever the config says.
    return read_decoder(f, [one] * f.take("num_hidden_layers"), LayerNorm(1e-5), (Normalise(norm),))


def write(config):
    mixes = each(config, ChannelMix4)
    return {**write_decoder(config), "num_hidden_layers": len(mixes), "attention_hidden_size": config.width,
            "intermediate_size": mixes[0].hidden, "layer_norm_epsilon": each(config, Normalise)[0].norm.eps,
            "rescale_every": 0}


FAMILY = Family(("rwkv",), "RwkvForCausalLM", DEFAULTS, read, write, OUTER, (Blocks(BLOCK, "rwkv.blocks.{i}."),),
                base="rwkv.")
