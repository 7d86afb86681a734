"""RWKV-5, Eagle (arXiv:2404.05892), under the official names of its version 5.2."""

from archlab.hub.family import Blocks, Family, each
from archlab.hub.layout import Apart, Vector
from archlab.hub.rwkv import ARCHITECTURE, BLOCK, DEFAULTS, OUTER, PREFIX, read_blocks, write_blocks
from archlab.recurrence.rwkv5 import RWKV5, ChannelMix5
from archlab.zoo.rwkv import block, hidden

NAMES = BLOCK | {"layers/0/layer/mix_{key,value,receptance,gate}": Vector("att.time_mix_{k,v,r,g}"),
                 "layers/0/layer/{decay,bonus}": Apart("att.time_{decay,faaaa}"),
                 "layers/1/layer/mix_{key,receptance}": Vector("ffn.time_mix_{k,r}")}


def read(f):
    channel = ChannelMix5(f.take("intermediate_size") or hidden(f.positive("hidden_size")))
    return read_blocks(f, [block(RWKV5(f.take("head_size")), channel)] * f.positive("num_hidden_layers"))


def write(config):
    return write_blocks(config, each(config, RWKV5), each(config, ChannelMix5))


FAMILY = Family(("rwkv5",), ARCHITECTURE, DEFAULTS, read, write, OUTER, (Blocks(NAMES, PREFIX),))
