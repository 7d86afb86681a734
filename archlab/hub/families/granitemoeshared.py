"""Granite 3 MoE (IBM 2024) with an MLP beside the experts, which all tokens share."""

from archlab.hub.decoders import ATTENTION, OUTER, PRE_NORMS
from archlab.hub.families import granitemoe
from archlab.hub.family import Blocks, Family, each
from archlab.layers.mlp import MLP

DEFAULTS = granitemoe.DEFAULTS | dict(shared_intermediate_size=0)

SHARED = {"layers/1/layer/layers/1/{gate,up}": "shared_mlp.input_linear.weight",
          "layers/1/layer/layers/1/down": "shared_mlp.output_linear.weight"}
BOTH = granitemoe.experts_at("layers/1/layer/layers/0") | SHARED


def read(f):
    return granitemoe.read(f, f.take("shared_intermediate_size"))


def write(config):
    shared = [mlp.hidden for mlp in each(config, MLP)]
    return {**granitemoe.write(config), "shared_intermediate_size": shared[0] if shared else 0}


FAMILY = Family(("granitemoeshared",), "GraniteMoeSharedForCausalLM", DEFAULTS, read, write, OUTER,
                (Blocks(ATTENTION | PRE_NORMS | granitemoe.experts_at("layers/1/layer") | BOTH),))
