"""What the official checkpoints of RWKV-5, 6 and 7 have in common: their names, and the fields that we define for them.

They are pickles without a config.json. docs/huggingface.md shows how their owner makes a folder of one: the tensors
under their names, and a config.json of `vocab_size`, `hidden_size`, `num_hidden_layers`, `head_size`, the ranks of
low-rank maps, and `intermediate_size`.
"""

from archlab.hub.decoders import read_decoder, write_decoder
from archlab.layers.config import LayerConfig
from archlab.layers.norms import LayerNorm, Normalise
from archlab.model import LanguageModel

ARCHITECTURE = "RWKV"  # what the official code calls its model
DEFAULTS = dict(vocab_size=65536, head_size=64, intermediate_size=None, tie_word_embeddings=False)
PREFIX = "blocks.{i}."
OUTER = {"embed/table": "emb.weight", "body/layers/0/norm/{scale,bias}": "blocks.0.ln0.{weight,bias}",
         "norm/{scale,bias}": "ln_out.{weight,bias}", "head/weight": "head.weight"}
BLOCK = {"layers/{0,1}/before/{scale,bias}": "ln{1,2}.{weight,bias}",
         "layers/0/layer/{receptance,key,value,gate,out}": "att.{receptance,key,value,gate,output}.weight",
         "layers/0/layer/norm/{scale,bias}": "att.ln_x.{weight,bias}",
         "layers/1/layer/{key,value,receptance}": "ffn.{key,value,receptance}.weight"}


def read_blocks(f, blocks: list[LayerConfig]) -> LanguageModel:
    return read_decoder(f, blocks, LayerNorm(), (Normalise(LayerNorm()),))


def write_blocks(config: LanguageModel, time: list, channel: list) -> dict:
    """time, channel: the mixes of all layers."""
    return {**write_decoder(config), "num_hidden_layers": len(time), "head_size": time[0].head_size,
            "intermediate_size": channel[0].hidden}
