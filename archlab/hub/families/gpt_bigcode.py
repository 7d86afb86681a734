"""SantaCoder and StarCoder (arXiv:2301.03988, arXiv:2305.06161): GPT-2 whose heads share one key and one value."""

import dataclasses

from archlab.attention.attention import Attention
from archlab.hub.families import gpt2
from archlab.hub.family import Blocks, Family, each
from archlab.hub.layout import Fused

DEFAULTS = gpt2.DEFAULTS | dict(activation_function="gelu_pytorch_tanh", multi_query=True)
RUNNING = ("inference_runner", "max_batch_size", "pad_key_length", "pre_allocate_kv_cache", "validate_runner_input")

BLOCK = gpt2.BLOCK | {"layers/0/layer/{query,key,value}": Fused("attn.c_attn.weight"),
                      "layers/0/layer/{query,key,value}_bias": Fused("attn.c_attn.bias")}


def read(f):
    kv_heads = 1 if f.take("multi_query") else f.take("num_attention_heads")
    f.only("num_key_value_heads", kv_heads, default=kv_heads)
    f.only("scale_attn_by_inverse_layer_idx", False)  # GPT-2's alone
    for name in RUNNING:  # how its first server ran it
        f.take(name, None)
    grouped = lambda node: dataclasses.replace(node, kv_heads=kv_heads) if isinstance(node, Attention) else node
    return gpt2.read(f).map(grouped)


def write(config):
    return {**gpt2.write(config), "multi_query": each(config, Attention)[0].kv_heads == 1}


FAMILY = Family(("gpt_bigcode",), "GPTBigCodeForCausalLM", DEFAULTS, read, write, gpt2.OUTER,
                (Blocks(BLOCK, "transformer.h.{i}."),), spelling=gpt2.SPELLING, base="transformer.",
                buffers=gpt2.FAMILY.buffers)
