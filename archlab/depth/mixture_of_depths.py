"""Mixture-of-Depths: a block is for a share of the tokens only; the others go round it.

Raposo et al. 2024 (arXiv:2404.02258). Every second block routed, as published, is
`Repeat(Sequence(block, MixtureOfDepths(block)), depth // 2)`.
"""

import dataclasses
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from archlab.depth.gather import through
from archlab.depth.router import TokenRouter
from archlab.depth.routing import as_share, budget, check_share, check_slack, slots_for, with_slack
from archlab.depth.top_tokens import TopTokens
from archlab.layers.alphabet import reuse
from archlab.layers.config import LayerConfig
from archlab.layers.contract import Aux, Layer, Place, Tokens, count_positions, pytree


class MixtureOfDepths(LayerConfig):
    """`h + g (unit(h) - h)` for the chosen tokens of each document, h for the others; g is the router's gate.

    unit is a block with its residual paths, of which the gate scales what they add. The chosen see each other only. In
    the training form a row's best fill the capacity, one at the least; otherwise no more of a document's tokens so far
    pass than the capacity, rounded down, first come, first served, and caches have no more slots: at 1/8 none of a
    document's first seven tokens passes.

    capacity: a share in (0, 1]. slack: so much more than that may pass where nothing looks ahead (0.1: a tenth more).
    """

    unit: LayerConfig
    capacity: float = 0.125
    router: TokenRouter = TopTokens(gate="linear")
    slack: float = 0.0

    def __post_init__(self):
        check_share(self, "capacity", self.capacity)
        check_slack(self)

    @property
    def share(self) -> Fraction:
        """The capacity as an exact fraction."""
        return as_share(self.capacity)

    @property
    def looks_ahead(self) -> bool:
        return self.share < 1 and self.router.looks_ahead or super().looks_ahead

    def build(self, rngs: nnx.Rngs, at: Place) -> "MixtureOfDepthsModule":
        return MixtureOfDepthsModule(self, rngs, at)


@pytree
class RouteState:
    """unit: the unit's state, sized by the capacity; passed [B]: how many tokens of the row's last document it took;
    segment, length [B]: that document, and how many tokens it has had; slots: for how many of a row it has room."""

    unit: Any
    passed: Int[Array, "B"]
    segment: Int[Array, "B"]
    length: Int[Array, "B"]
    slots: int = dataclasses.field(metadata={"static": True})


class MixtureOfDepthsModule(Layer):
    """Weights: the unit's and the router's.

    Loss: router (0 outside training). Traces: depth [B, T], 1 for who passed; gate [B, T]; in the training form
    agreement, the share of tokens for whom the causal rule (before budgets) and the choice made agree. The unit's
    traces are over the tokens gathered: not [B, T]. What the unit publishes is not handed on: others have none of it.
    """

    def __init__(self, config: MixtureOfDepths, rngs: nnx.Rngs, at: Place):
        self.config, self.room = config, with_slack(config.share, config.slack)
        self.unit = config.unit.build(rngs, at)
        self.router = config.router.build(rngs, at)
        reuse(self.unit, float(config.share))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        slots, numbers = max(1, budget(self.room, max_length)), lambda: jnp.zeros((batch,), jnp.int32)
        unit = self.unit.init_state(batch, slots, dtype, memory)
        return RouteState(unit, numbers(), numbers(), numbers(), slots)

    def __call__(self, x, tokens: Tokens, state: RouteState | None = None):
        T, none = x.shape[1], jnp.zeros(x.shape[:1], jnp.int32)
        look_ahead = tokens.training is not None and state is None and self.config.router.looks_ahead
        last, length, passed, past = ((none, none, none, None) if state is None else
                                      (state.segment, state.length, state.passed, state.unit))
        # Counted here and not read from tokens.positions, which need not count what passes through this layer.
        places, last, length = count_positions(tokens.segments, last, length)
        choice = self.router(x, tokens.real, self.config.share, self.room, places, tokens, passed, look_ahead)

        slots = slots_for(self.config.share if look_ahead else self.room, T, None if state is None else state.slots)
        warmup = self.config.router.warmup if look_ahead else 0
        y, inner, aux = through(self.unit, x, choice.chosen, slots, tokens, past, warmup)
        added = jnp.where(choice.chosen[:, :, None], y - x, 0)
        said = aux.within().under("unit") | Aux({"router": jnp.asarray(choice.loss)},
                                       {"depth": choice.chosen.astype(jnp.int32), "gate": choice.gate})
        if choice.agreement is not None:
            said.traces["agreement"] = choice.agreement
        if state is not None:
            state = RouteState(inner, choice.passed, last, length, state.slots)
        return x + choice.gate[:, :, None].astype(x.dtype) * added, state, said
