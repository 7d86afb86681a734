"""RWKV-7, Goose (arXiv:2503.14456), under the official names. The first block stands in a `Provide`."""

from archlab.hub import rwkv
from archlab.hub.family import Blocks, Family, each
from archlab.hub.layout import Apart, InputsFirst, Vector
from archlab.hub.rwkv import ARCHITECTURE, BLOCK, OUTER, PREFIX, read_blocks, write_blocks
from archlab.recurrence.rwkv7 import RWKV7, ChannelMix7
from archlab.zoo.rwkv import block, publishing

RANKS = dict(decay_rank=64, rate_rank=64, value_rank=32, gate_rank=128)
DEFAULTS = rwkv.DEFAULTS | RANKS
NAMES = BLOCK | {
    "layers/0/layer/mix_{receptance,decay,key,value,rate,gate}": Vector("att.x_{r,w,k,v,a,g}"),
    "layers/0/layer/{decay,rate,blend}/bias": Vector("att.{w,a,v}0"),
    "layers/0/layer/{decay,rate,blend,gate}/down": InputsFirst("att.{w,a,v,g}1"),
    "layers/0/layer/{decay,rate,blend,gate}/up": InputsFirst("att.{w,a,v,g}2"),
    "layers/0/layer/{removal,replacement}": Vector("att.k_{k,a}"),
    "layers/0/layer/bonus": Apart("att.r_k"),
    "layers/1/layer/mix_key": Vector("ffn.x_k")}
NAMES |= {f"layer/{ours}": theirs for ours, theirs in NAMES.items()}  # of the first block


def read(f):
    time = RWKV7(f.take("head_size"), **{name: f.take(name) for name in RANKS})
    one = block(time, ChannelMix7(f.take("intermediate_size") or 4 * f.positive("hidden_size")))
    return read_blocks(f, [publishing(one)] + [one] * (f.positive("num_hidden_layers") - 1))


def write(config):
    time = each(config, RWKV7)
    ranks = {name: getattr(time[-1], name) for name in RANKS}
    return {**write_blocks(config, time, each(config, ChannelMix7)), **ranks}


# Some files have what would mix the first layer's values with themselves.
FAMILY = Family(("rwkv7",), ARCHITECTURE, DEFAULTS, read, write, OUTER, (Blocks(NAMES, PREFIX),),
                buffers=("*.blocks.0.att.v[012]",))
