"""What the mixtures of experts of the hub share. What only training asks for, a coefficient of the balance loss, is
read and written but distinguishes no architecture (`family.settled`)."""

from archlab.experts.balance import SwitchLoss
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.hub.decoders import ACTIVATIONS, write_activation
from archlab.hub.family import each
from archlab.hub.fields import Fields
from archlab.layers.residual import Residual


def experts_at(path: str, name: str) -> dict:
    """The table of experts that are tensors of their own, as most models store them: `path` is that of our `MoE`,
    `name` what stands before theirs."""
    return {f"{path}/{{gate,up,down}}": f"{name}.experts.{{e}}.{{gate,up,down}}_proj.weight",
            f"{path}/router/weight": f"{name}.gate.weight"}


def read_moe(f: Fields, experts: str, hidden: str, router: TopK, **fields) -> MoE:
    """Gated experts. experts, hidden: the names of the fields that say how many and how wide; fields: more of `MoE`'s,
    `activation` among them or not."""
    if "activation" not in fields:
        fields["activation"] = f.choose("hidden_act", ACTIVATIONS)
    return MoE(f.positive(experts), f.positive(hidden), router, balance=read_balance(f, router.k), **fields)


def read_balance(f: Fields, k: int, name: str = "router_aux_loss_coef") -> tuple[SwitchLoss, ...]:
    """In transformers the shares of the choices sum to k, in ours to 1."""
    weight = f.take(name)
    return (SwitchLoss(round(weight * k, 12)),) if weight else ()


def write_moe(config, experts: str, hidden: str) -> dict:
    """The inverse of `read_moe`, router and all."""
    moe = each(config, MoE)[0]
    activation = {"hidden_act": write_activation(moe)} if isinstance(moe.activation, str) else {}
    return {experts: moe.experts, hidden: moe.hidden, "num_experts_per_tok": moe.router.k,
            **activation, "router_aux_loss_coef": write_balance(moe)}


def write_balance(moe: MoE) -> float:
    """The inverse of `read_balance`."""
    return round(sum(loss.weight for loss in moe.balance if isinstance(loss, SwitchLoss)) / moe.router.k, 12)


def feed_forwards(config) -> list:
    """What stands in each block in the place of the MLP, an MLP or experts; of blocks as `sequential` makes them."""
    return [residual.layer for residual in each(config, Residual)[1::2]]
