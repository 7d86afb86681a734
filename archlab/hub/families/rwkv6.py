"""RWKV-6, Finch (arXiv:2404.05892), under the official names."""

from archlab.hub import rwkv
from archlab.hub.family import Blocks, Family, each
from archlab.hub.layout import Apart, InputsFirst, Vector
from archlab.hub.rwkv import ARCHITECTURE, BLOCK, OUTER, PREFIX, read_blocks, write_blocks
from archlab.recurrence.rwkv6 import RWKV6, ChannelMix6
from archlab.zoo.rwkv import block, hidden

DEFAULTS = rwkv.DEFAULTS | dict(mix_rank=32, decay_rank=64)
NAMES = BLOCK | {
    "layers/0/layer/mix_{base,decay,key,value,receptance,gate}": Vector("att.time_maa_{x,w,k,v,r,g}"),
    "layers/0/layer/mix_{down,up}": InputsFirst("att.time_maa_{w1,w2}"),
    "layers/0/layer/decay/bias": Vector("att.time_decay"),
    "layers/0/layer/decay/{down,up}": InputsFirst("att.time_decay_{w1,w2}"),
    "layers/0/layer/bonus": Apart("att.time_faaaa"),
    "layers/1/layer/mix_{key,receptance}": Vector("ffn.time_maa_{k,r}")}


def read(f):
    time = RWKV6(f.take("head_size"), f.take("mix_rank"), f.take("decay_rank"))
    channel = ChannelMix6(f.take("intermediate_size") or hidden(f.positive("hidden_size")))
    return read_blocks(f, [block(time, channel)] * f.positive("num_hidden_layers"))


def write(config):
    time = each(config, RWKV6)
    return {**write_blocks(config, time, each(config, ChannelMix6)), "mix_rank": time[0].mix_rank,
            "decay_rank": time[0].decay_rank}


FAMILY = Family(("rwkv6",), ARCHITECTURE, DEFAULTS, read, write, OUTER, (Blocks(NAMES, PREFIX),))
