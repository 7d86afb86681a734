"""Switch Transformers (arXiv:2101.03961): T5 with experts in some layers, of which every token goes to one.

`expert_capacity` bounds how many tokens of a row an expert takes in transformers, there without training too; ours
drops nothing, which is the same for rows up to so many tokens, and wherever no expert is chosen more often.
"""

from archlab.experts.balance import SwitchLoss, ZLoss
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.hub.decoders import ACTIVATIONS, write_activation
from archlab.hub.families import t5
from archlab.hub.family import Blocks, Family, each
from archlab.layers.mlp import MLP
from archlab.layers.residual import Residual

DEFAULTS = t5.DEFAULTS | dict(
    vocab_size=32128, hidden_size=768, d_ff=2048, num_hidden_layers=12, num_attention_heads=12, num_experts=8,
    num_sparse_encoder_layers=3, num_sparse_decoder_layers=3, router_bias=False, router_jitter_noise=0.01,
    router_z_loss_coef=0.001, router_aux_loss_coef=0.001, dense_act_fn="relu")
NO_MATTER = ("add_router_probs", "decoder_sparse_step", "encoder_sparse_step", "expert_capacity", "router_dtype",
             "router_ignore_padding_tokens")


def names(table, i):
    """The tensors of a block whose layer `i` is an MLP, or has experts."""
    mlp = f"layer.{i}.mlp"
    return table | {f"layers/{i}/layer/{{up,down}}": (f"{mlp}.experts.expert_{{e}}.{{wi,wo}}.weight",
                                                      f"{mlp}.{{wi,wo}}.weight"),
                    f"layers/{i}/layer/router/{{weight,bias}}": f"{mlp}.router.classifier.{{weight,bias}}"}


def read(f):
    f.only("router_type", "tokens_masked", default="tokens_masked")
    f.only("feed_forward_proj", "relu", default="relu")  # dense_act_fn is what counts
    f.only("is_gated_act", False, default=False)
    for name in NO_MATTER:
        f.take(name, None)
    activation, losses = f.choose("dense_act_fn", ACTIVATIONS), (
        SwitchLoss(f.take("router_aux_loss_coef")), ZLoss(f.take("router_z_loss_coef")))
    router = TopK(1, jitter=f.take("router_jitter_noise"), bias=f.take("router_bias"))
    mlp = MLP(f.positive("d_ff"), activation)
    moe = MoE(f.positive("num_experts"), mlp.hidden, router, balance=losses, activation=activation, gated=False)

    layers = f.take("num_hidden_layers")
    side = lambda n, experts: [moe if sparse else mlp for sparse in placed(n, f.take(experts))]
    return t5.read_sides(f, side(layers, "num_sparse_encoder_layers"),
                         side(f.take("num_decoder_layers") or layers, "num_sparse_decoder_layers"),
                         scaled=f.take("tie_word_embeddings", True))


def placed(layers, experts):
    """Which of the layers of a side have experts, where so many are said to have them (0 leaves one)."""
    step = layers // experts if experts else layers
    return [step == 1 or step > 1 and i % step == 1 for i in range(layers)]


def count(layers):
    """The inverse of `placed`; 0 where there is none."""
    return next((n for n in range(len(layers) + 2) if placed(len(layers), n) == layers), 0)


def write(config):
    moe, kinds = each(config, MoE)[0], lambda side, parts: [isinstance(r.layer, MoE)
                                                            for r in each(side, Residual)[parts - 1::parts]]
    weight = lambda kind: sum(loss.weight for loss in moe.balance if isinstance(loss, kind))
    return {**t5.write_sides(config), "d_ff": moe.hidden, "num_experts": moe.experts, "router_bias": moe.router.bias,
            "router_jitter_noise": moe.router.jitter, "dense_act_fn": write_activation(moe),
            "router_aux_loss_coef": weight(SwitchLoss), "router_z_loss_coef": weight(ZLoss),
            "num_sparse_encoder_layers": count(kinds(config.encoder, 2)),
            "num_sparse_decoder_layers": count(kinds(config.body, 3))}


FAMILY = Family(("switch_transformers",), "SwitchTransformersForConditionalGeneration", DEFAULTS, read, write, t5.OUTER,
                (Blocks(names(t5.SELF, 1), "encoder.block.{i}.", "encoder"),
                 Blocks(names(t5.BOTH, 2), "decoder.block.{i}.")),
                spelling=t5.SPELLING, base="", copies=t5.FAMILY.copies, copied=True, buffers=t5.FAMILY.buffers)
