"""Mixture-of-Recursions: one unit recurs, and a router decides for every token how often.

Bae et al. 2025 (arXiv:2507.10524): expert-choice and token-choice routing (section 2.2.1), recursion-wise caching and
recursive key-value sharing (section 2.2.2). Middle-cycle sharing is `Sequence(first, MixtureOfRecursions(unit, n),
last)`; `sharing.py` has the other patterns.
"""

import dataclasses
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from archlab.attention.cache import KVCache
from archlab.depth.depth_choice import DepthChoice, last_alone
from archlab.depth.gather import through
from archlab.depth.own import join_updates, of_recursion, recurring
from archlab.depth.router import TokenRouter
from archlab.depth.routing import (
    as_share, budget, check_share, check_slack, choose_within_budget, slots_for, with_slack)
from archlab.depth.top_tokens import TopTokens
from archlab.layers.config import LayerConfig, near, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, count_positions, pytree

LONG = 2**24  # tokens, more than any window sees


class MixtureOfRecursions(LayerConfig):
    """`unit` applied up to `n` times with one set of weights; recursion r is for a share of the tokens only.

    Tokens that go through a recursion see each other only, and are the next one's candidates; the others keep what they
    have. Unit means all of it, its own residual paths too, as in the paper and its code, and g is the router's gate:

      router=TopTokens():   h <- h + g_r unit(h); each recursion chooses its tokens (expert choice).
      router=DepthChoice(): h <- unit(h), and after the last h <- h_0 + g h, with h_0 from before all (token choice).

    Everywhere but in the training form of `TopTokens` a recursion takes no more than its share of a document's tokens
    so far, first come, first served. So no document needs more cache slots, nor more of a gathered row, than its share.

    capacities: one share in (0, 1] a recursion, never growing; None for (n - r) / n. slack: so much more than its share
    a recursion may take where nothing looks ahead (0.1: a tenth more). cache: "recursion", each recursion keeps keys
    and values of its own tokens; or "shared": all attend to what the first recursion kept of all tokens. Then attention
    must be the unit's only memory, and the first capacity 1.
    """

    unit: LayerConfig
    n: int
    capacities: tuple[float, ...] | None = None
    router: TokenRouter | DepthChoice = TopTokens()
    cache: str = "recursion"
    slack: float = 0.0

    def __post_init__(self):
        require(self.n >= 1, self, "n", "must be at least 1")
        check_slack(self)
        require(self.cache in ("recursion", "shared"), self, "cache", near(str(self.cache), ("recursion", "shared")))
        if self.capacities is not None:
            given = self.capacities
            require(isinstance(given, tuple) and len(given) == self.n, self, "capacities",
                    f"must be a tuple of n = {self.n} shares, one for each recursion")
            for capacity in given:
                check_share(self, "capacities", capacity)
            require(all(a >= b for a, b in zip(given, given[1:])), self, "capacities",
                    "must not grow: only those who passed one recursion are candidates for the next")
        require(self.cache == "recursion" or self.shares[0] == 1, self, "capacities",
                "the first must be 1 where its keys are shared: later recursions attend to all tokens")

    def check(self, width: int) -> None:
        self.unit.check(width)
        if self.cache == "shared":
            build = lambda: self.unit.build(nnx.Rngs(0), Place(width, 0, self.branches))
            kept = jax.tree.leaves(jax.eval_shape(lambda: build().init_state(1, LONG)), is_leaf=_is_cache)
            whole = lambda state: _is_cache(state) and state.keys.shape[-2] == LONG  # and no window's ring
            others = sorted({"a window's keys" if _is_cache(state) else "other memory" for state in kept
                             if not whole(state)}) or ["no memory"] * (not kept)
            require(not others, self, "cache", "wants a unit whose only memory is the keys and values of attention "
                    f"over all of the text; this one has {' and '.join(others)}")

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """The capacities as exact fractions."""
        given = self.capacities or tuple((self.n - r) / self.n for r in range(self.n))
        return tuple(as_share(c) for c in given)

    @property
    def branches(self) -> int:
        return self.n * self.unit.branches

    @property
    def looks_ahead(self) -> bool:
        return self.shares[-1] < 1 and self.router.looks_ahead or super().looks_ahead

    def build(self, rngs: nnx.Rngs, at: Place) -> "MixtureOfRecursionsModule":
        return MixtureOfRecursionsModule(self, rngs, at)


@pytree
class RecursionState:
    """units: the unit's state at each recursion, sized by its share (the first one's alone where it is shared); passed
    [B, n]: tokens of the row's last document that each recursion took; segment, length [B]: that document, and how
    many tokens it has had; slots: for how many tokens of a row each recursion has room."""

    units: tuple[Any, ...]
    passed: Int[Array, "B n"]
    segment: Int[Array, "B"]
    length: Int[Array, "B"]
    slots: tuple[int, ...] = dataclasses.field(metadata={"static": True})


class MixtureOfRecursionsModule(Layer):
    """Weights: the unit's; routers, one for each recursion, or router, where depth is chosen once.

    Losses: of the routers (0 outside training). Traces: depth [B, T], recursions taken; gate [n, B, T], 0 for who was
    no candidate; in the training form of `TopTokens` agreement [n], the share of candidates for whom the causal rule
    (before budgets) and the choice made agree, 1 where all pass. The unit's traces stand under `unit/r`, each over the
    tokens that recursion gathered: not [B, T]. What the unit publishes is not handed on. Where only the last token
    recurs, depth and gate are those that routing gives to all.
    """

    def __init__(self, config: MixtureOfRecursions, rngs: nnx.Rngs, at: Place):
        self.config, self.shares = config, config.shares
        self.rooms = tuple(with_slack(share, config.slack) for share in config.shares)
        self.unit = recurring(config.unit, config.n, rngs, at, uses=float(sum(config.shares)))
        once = isinstance(config.router, DepthChoice)
        self.router = config.router.build(rngs, at, config.n) if once else None
        self.routers = None if once else nnx.List([config.router.build(rngs, at) for _ in self.shares])

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        sizes = tuple(max(1, budget(room, max_length)) for room in self.rooms)
        kept = sizes[:1] if self.config.cache == "shared" else sizes
        units = tuple(of_recursion(self.unit, r).init_state(batch, size, dtype, memory) for r, size in enumerate(kept))
        numbers = lambda *shape: jnp.zeros((batch, *shape), jnp.int32)
        return RecursionState(units, numbers(len(sizes)), numbers(), numbers(), sizes)

    def __call__(self, x, tokens: Tokens, state: RecursionState | None = None):
        none = jnp.zeros(x.shape[:1], jnp.int32)
        last, length = (none, none) if state is None else (state.segment, state.length)
        # Counted here and not read from tokens.positions, which need not count what passes through this layer.
        places, last, length = count_positions(tokens.segments, last, length)
        passed = jnp.zeros((x.shape[0], len(self.shares)), jnp.int32) if state is None else state.passed
        recur = self._each_chooses if self.router is None else self._chosen_once
        x, units, passed, aux = recur(x, tokens, state, places, passed)
        if state is not None:
            state = RecursionState(units, jnp.stack(passed, 1), last, length, state.slots)
        return x, state, aux

    def _each_chooses(self, x, tokens, state, places, passed):
        """Expert choice: recursion r chooses among those who passed the one before."""
        look_ahead = tokens.training is not None and state is None and self.config.router.looks_ahead
        active, depth = tokens.real, jnp.zeros(tokens.segments.shape, jnp.int32)
        unit, counts, gates, agreements, said, loss = _Pass(self, tokens, state), [], [], [], Aux(), 0
        for r, router in enumerate(self.routers):
            choice = router(x, active, self.shares[r], self.rooms[r], places, tokens.fold(r), passed[:, r], look_ahead)
            y, aux = unit.recur(r, x, choice.chosen, self.shares[r] == 1, look_ahead)
            x = x + choice.gate[:, :, None].astype(x.dtype) * y
            active, depth = choice.chosen, depth + choice.chosen
            counts.append(choice.passed)
            gates.append(choice.gate)
            agreements += [] if choice.agreement is None else [choice.agreement]
            said, loss = said | aux, loss + choice.loss
        said.losses["router"] = jnp.asarray(loss)
        said.traces.update(depth=depth, gate=jnp.stack(gates))
        if agreements:
            said.traces["agreement"] = jnp.stack(agreements)
        return x, tuple(unit.states), counts, said | unit.updates()

    def _chosen_once(self, x, tokens, state, places, passed):
        """Token choice: who goes how deep is settled before the first recursion."""
        choice = self.router(x, tokens)
        active, depth, takes, counts = tokens.real, jnp.zeros(tokens.segments.shape, jnp.int32), [], []
        for r, room in enumerate(self.rooms):
            active, count = choose_within_budget(active & (choice.wanted > r), room, places, tokens.real, passed[:, r])
            takes.append(active)
            counts.append(count)
            depth = depth + active
        gates = last_alone(choice.gates, depth)
        last = jnp.arange(x.shape[1]) == jnp.maximum(tokens.real.sum(1) - 1, 0)[:, None]
        alone = tokens.last_only and state is not None and self.config.cache == "shared"  # the rest leaves no keys

        unit, first, said = _Pass(self, tokens, state), x, choice.aux.under("router")
        for r, chosen in enumerate(takes):
            chosen = chosen & last if alone and r else chosen
            y, aux = unit.recur(r, x, chosen, r == 0 and self.shares[0] == 1, most=1 if alone and r else None)
            home = jnp.where((depth == r + 1)[:, :, None], first, 0)
            x = jnp.where(chosen[:, :, None], gates[:, :, r, None].astype(x.dtype) * y + home, x)
            said |= aux
        said.traces.update(depth=depth, gate=jnp.where(jnp.stack(takes), jnp.moveaxis(gates, 2, 0), 0))
        return x, tuple(unit.states), counts, said | unit.updates()


class _Pass:
    """One pass over a piece: which state each recursion reads, what states they leave, and what they want updated."""

    def __init__(self, mixture: MixtureOfRecursionsModule, tokens: Tokens, state: RecursionState | None):
        self.mixture, self.tokens, self.state = mixture, dataclasses.replace(tokens, last_only=False), state
        self.shared = mixture.config.cache == "shared"
        self.states, self.said = [], []  # of shared keys, the first recursion's alone

    def recur(self, r: int, x, chosen: Bool[Array, "B T"], all_pass: bool, look_ahead: bool = False,
              most: int | None = None):
        """The unit's output for the chosen tokens, 0 for others; its aux. most: how many of a row are chosen at most;
        None for the recursion's share."""
        (tokens, past), mixture, T = self._reading(r, x), self.mixture, x.shape[1]
        slots = slots_for((mixture.shares if look_ahead else mixture.rooms)[r], T,
                          None if self.state is None else self.state.slots[r])
        unit = of_recursion(mixture.unit, r)
        if all_pass:  # and they stand in front already
            y, state, aux = unit(x, tokens, past)
            y, places = jnp.where(chosen[:, :, None], y, 0), jnp.broadcast_to(jnp.arange(T), chosen.shape)
            policies = {name: policy.take(places, chosen) for name, policy in aux.policies.items()}
            aux = dataclasses.replace(aux, policies=policies)
        else:
            y, state, aux = through(unit, x, chosen, most or slots, tokens, past,
                                    mixture.config.router.warmup if look_ahead else 0)
        if r == 0 or not self.shared:
            self.states.append(state)
        self.said.append(aux.updates)
        return y, Aux(aux.losses, aux.traces, policies=aux.policies).under(f"unit/{r}")

    def _reading(self, r: int, x):
        """The tokens of a recursion, and the state it starts from."""
        tokens = self.tokens.fold(r)
        if not self.shared:
            return tokens, None if self.state is None else self.state.units[r]
        if r:
            return dataclasses.replace(tokens, keys="read"), self.states[0]
        if self.state is not None:
            return tokens, self.state.units[0]
        like = jax.eval_shape(lambda: of_recursion(self.mixture.unit, 0).init_state(*x.shape[:2]))
        return dataclasses.replace(tokens, keys="keep"), jax.tree.map(lambda _: None, like, is_leaf=_is_cache)

    def updates(self) -> Aux:
        """What all recursions want of the unit's variables."""
        stacked = jax.tree.map(lambda *steps: jnp.stack(steps), *self.said)
        return Aux(updates=join_updates(self.mixture.unit, stacked)).under("unit")


def _is_cache(node) -> bool:
    return isinstance(node, KVCache)
