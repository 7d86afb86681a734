"""Mixture-of-Recursions: one unit recurs, and a router decides at every recursion which tokens go on.

Bae et al. 2025 (arXiv:2507.10524): expert-choice routing with hierarchical filtering (section 2.2.1), the auxiliary
loss that makes it causal, recursion-wise caching (section 2.2.2). Middle-cycle sharing is `Sequence(first,
MixtureOfRecursions(unit, n), last)`.
"""

import dataclasses
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from archlab.depth.routing import DENOMINATOR, as_share, budget, choose_best, choose_within_budget
from archlab.layers.alphabet import parameter, project, reuse
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, count_positions, pytree, wide


class MixtureOfRecursions(LayerConfig):
    """`unit` applied up to `n` times with one set of weights; recursion r is for a share of the tokens only.

    A linear router gives each candidate a gate `g = sigmoid(w_r . h)`. The chosen ones become `h + g unit(h)` (unit
    means all of it, with its own residual paths, as in the paper and its code), see each other only, and are the next
    recursion's candidates; the others keep their h.

    Training form (no state): the row's best, by g, fill the capacity. That looks ahead. An auxiliary loss, the binary
    cross-entropy of the router's logit with that choice, teaches g > 1/2 to predict it. Otherwise: a candidate passes
    if g > 1/2 and its document's budget, `floor(capacity * tokens so far)`, has room. That is causal, and no document
    needs more than its share of cache slots. Where the capacity is 1 all pass and there is nothing to teach.

    capacities: one share in (0, 1] a recursion, never growing; None for (n - r) / n. aux_loss: its weight.
    """

    unit: LayerConfig
    n: int
    capacities: tuple[float, ...] | None = None
    aux_loss: float = 0.001

    def __post_init__(self):
        require(self.n >= 1, self, "n", "must be at least 1")
        require(self.aux_loss >= 0, self, "aux_loss", "must be 0 (none) or positive")
        if self.capacities is not None:
            given = self.capacities
            require(isinstance(given, tuple) and len(given) == self.n, self, "capacities",
                    f"must be a tuple of n = {self.n} shares, one for each recursion")
            require(all(0 < c <= 1 for c in given), self, "capacities", "each must lie in (0, 1]")
            require(all(as_share(c) > 0 for c in given), self, "capacities",
                    f"a share that rounds to no token: each must be at least 1/{DENOMINATOR}")
            require(all(a >= b for a, b in zip(given, given[1:])), self, "capacities",
                    "must not grow: only those who passed one recursion are candidates for the next")

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """The capacities as exact fractions."""
        given = self.capacities or tuple((self.n - r) / self.n for r in range(self.n))
        return tuple(as_share(c) for c in given)

    @property
    def branches(self) -> int:
        return self.n * self.unit.branches

    def build(self, rngs: nnx.Rngs, at: Place) -> "MixtureOfRecursionsModule":
        return MixtureOfRecursionsModule(self, rngs, at)


@pytree
class RecursionState:
    """units: the unit's state at each recursion, sized by its share; passed [B, n]: tokens of the row's last document
    that each recursion took; segment, length [B]: that document, and how many tokens it has had; slots: for how many
    tokens of a row each recursion has room."""

    units: tuple[Any, ...]
    passed: Int[Array, "B n"]
    segment: Int[Array, "B"]
    length: Int[Array, "B"]
    slots: tuple[int, ...] = dataclasses.field(metadata={"static": True})


class MixtureOfRecursionsModule(Layer):
    """Weights: the unit's, and one router [D, 1] for each recursion.

    Loss: router, summed over recursions (0 outside training). Traces: depth [B, T], recursions taken; gate [n, B, T],
    0 for who was no candidate; in the training form agreement [n], the share of candidates for whom the causal rule
    (before budgets) and the choice made agree. The unit's traces stand under `unit/r`, each over the tokens that
    recursion gathered: not [B, T].
    """

    def __init__(self, config: MixtureOfRecursions, rngs: nnx.Rngs, at: Place):
        self.shares, self.aux_loss = config.shares, config.aux_loss
        self.unit = config.unit.build(rngs, at)
        self.routers = nnx.List([parameter(rngs, "D->.", (at.width, 1)) for _ in self.shares])
        reuse(self.unit, float(sum(self.shares)))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        sizes = tuple(max(1, budget(share, max_length)) for share in self.shares)
        units = tuple(self.unit.init_state(batch, size, dtype, memory) for size in sizes)
        numbers = lambda *shape: jnp.zeros((batch, *shape), jnp.int32)
        return RecursionState(units, numbers(len(sizes)), numbers(), numbers(), sizes)

    def __call__(self, x, tokens: Tokens, state: RecursionState | None = None):
        B, T, _ = x.shape
        look_ahead = tokens.training is not None and state is None
        none = jnp.zeros((B,), jnp.int32)
        last, length = (none, none) if state is None else (state.segment, state.length)
        # Counted here and not read from tokens.positions, which need not count what passes through this layer.
        places, last, length = count_positions(tokens.segments, last, length)

        active, depth = tokens.real, jnp.zeros((B, T), jnp.int32)
        units, counts, gates, losses, agreements, said, updates = [], [], [], [], [], Aux(), []
        for r, share in enumerate(self.shares):
            logits = wide(project(x, self.routers[r], "BTD,DN->BTN"))[:, :, 0]
            gate = jnp.where(active, jax.nn.sigmoid(logits), 0)
            wish = active if share == 1 else active & (logits > 0)
            if share == 1 or not look_ahead:
                past = none if state is None else state.passed[:, r]
                chosen, passed = choose_within_budget(wish, share, places, tokens.real, past)
                counts.append(passed)
            else:
                chosen = choose_best(logits, active, share, tokens.real.sum(1))
                losses.append(_mean(jax.nn.softplus(logits) - jnp.where(chosen, logits, 0), active))
            if look_ahead:
                agreements.append(_mean(wish == chosen, active))

            # A piece that continues from a state may spend what its document has saved: up to what there is room for.
            slots = max(1, budget(share, T)) if state is None else min(T, state.slots[r])
            inner = None if state is None else state.units[r]
            x, inner, aux = self._recur(x, gate, chosen, slots, tokens.fold(r), inner)
            units.append(inner)
            updates.append(aux.updates)
            said |= Aux(aux.losses, aux.traces, policies=aux.policies).under(f"unit/{r}")
            gates.append(gate)
            active, depth = chosen, depth + chosen

        said.losses["router"] = self.aux_loss * sum(losses, jnp.float32(0))
        said.traces.update(depth=depth, gate=jnp.stack(gates))
        if look_ahead:
            said.traces["agreement"] = jnp.stack(agreements)
        summed = jax.tree.map(lambda *steps: sum(steps), *updates)
        aux = said | Aux(updates=summed).under("unit")
        if state is not None:
            state = RecursionState(tuple(units), jnp.stack(counts, 1), last, length, state.slots)
        return x, state, aux

    def _recur(self, x, gate, chosen: Bool[Array, "B T"], slots: int, tokens: Tokens, state):
        """`x + gate unit(x)` for the chosen, at most `slots` a row; the unit's state and aux.

        The chosen are gathered to the front in their order, so that a smaller share takes less time; the slots they
        leave empty are padding.
        """
        order = jnp.argsort(~chosen, axis=1, stable=True)
        index = order[:, :slots]
        B, T = chosen.shape

        def take(a):
            return jnp.take_along_axis(a, index.reshape(index.shape + (1,) * (a.ndim - 2)), axis=1)

        here = take(chosen)
        provided = jax.tree.map(lambda a: take(a) if a.shape[:2] == (B, T) else a, tokens.provided)
        gathered = dataclasses.replace(tokens, segments=jnp.where(here, take(tokens.segments), 0),
                                       positions=take(tokens.positions), provided=provided)
        y, state, aux = self.unit(take(x), gathered, state)
        if aux.policies:
            back = jnp.argsort(order, axis=1)
            policies = {name: policy.take(back, chosen) for name, policy in aux.policies.items()}
            aux = dataclasses.replace(aux, policies=policies)
        y = jnp.where(here[:, :, None], take(gate)[:, :, None].astype(y.dtype) * y, 0)
        return x.at[jnp.arange(B)[:, None], index].add(y, unique_indices=True), state, aux


def _mean(values: Float[Array, "B T"], where: Bool[Array, "B T"]) -> Float[Array, ""]:
    return jnp.where(where, values, 0).sum() / jnp.maximum(where.sum(), 1)
