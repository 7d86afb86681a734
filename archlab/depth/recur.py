"""Recurrence in depth: one unit, applied again and again to what it made."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.depth.coordinates import Coordinates
from archlab.depth.halting import ACT, Halting
from archlab.layers.alphabet import reuse
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, pytree


class Recur(LayerConfig):
    """`unit` applied `n` times with one set of weights; each step has a state of its own.

    With `signal` and `halting` this is the Universal Transformer (Dehghani et al. 2018, arXiv:1807.03819). A token
    that halts keeps its state unchanged from then on. Later steps still pass that state through the unit, so that
    running tokens find its keys and values, and drop the result: halting spares no work here, in decoding neither,
    since tokens yet to come may run longer. That keeps it causal and equal under every split through a state.

    n: the most steps. signal: what is added to the stream before each step; None for nothing. halting: None makes
    every token take n steps and gives the last one's output. scan: as in `Repeat`; None chooses by platform.
    """

    unit: LayerConfig
    n: int
    signal: Coordinates | None = None
    halting: ACT | None = None
    scan: bool | None = None

    def __post_init__(self):
        require(self.n >= 1, self, "n", "must be at least 1")

    def check(self, width: int) -> None:
        self.unit.check(width)
        require(self.signal is None or width % 2 == 0, self, "signal",
                f"sines and cosines alternate: the width {width} must be even")

    @property
    def branches(self) -> int:
        return self.n * self.unit.branches

    def build(self, rngs: nnx.Rngs, at: Place) -> "RecurModule":
        return RecurModule(self, rngs, at)


@pytree
class Flow:
    """What one step hands to the next: the stream [B, T, D], who has halted (None without), published values."""

    x: jax.Array
    halting: Halting | None
    provided: dict[str, jax.Array]


class RecurModule(Layer):
    """State: stacked over the steps where scanned, a tuple of n where unrolled. Losses, traces and policies of the unit
    are stacked over the steps; its updates, made n times to one set of variables, are summed."""

    def __init__(self, config: Recur, rngs: nnx.Rngs, at: Place):
        self.n, self.signal = config.n, config.signal
        self.scanned = jax.default_backend() != "cpu" if config.scan is None else config.scan
        self.unit = config.unit.build(rngs, at)
        self.halting = None if config.halting is None else config.halting.build(rngs, at)
        for shared in filter(None, (self.unit, self.halting)):
            reuse(shared, config.n)

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        states = tuple(self.unit.init_state(batch, max_length, dtype, memory) for _ in range(self.n))
        return jax.tree.map(lambda *steps: jnp.stack(steps), *states) if self.scanned else states

    def __call__(self, x, tokens: Tokens, state=None):
        start = None if self.halting is None else self.halting.start(x, tokens)
        run = self._scan if self.scanned else self._unroll
        end, state, said = run(Flow(x, start, tokens.provided), tokens, state)
        summed = jax.tree.map(lambda steps: steps.sum(0), said.updates)
        aux = dataclasses.replace(said, updates=summed).under("unit")
        if self.halting is None:
            return end.x, state, aux
        return end.halting.output, state, aux | self.halting.said(end.halting, tokens).under("halting")

    def _step(self, flow: Flow, tokens: Tokens, i, state) -> tuple[Flow, tuple[Any, Aux]]:
        before = flow.x
        if self.signal is not None:
            before = before + self.signal.signal(before, tokens.positions, i)
        tokens = tokens.provide(flow.provided).fold(i)
        after, state, aux = self.unit(before, tokens, state)
        provided = {**flow.provided, **aux.provides}
        aux = aux.within()
        if self.halting is None:
            return Flow(after, None, provided), (state, aux)
        halting = self.halting.update(flow.halting, before, after)
        return Flow(jnp.where(flow.halting.running[:, :, None], after, flow.x), halting, provided), (state, aux)

    def _unroll(self, flow, tokens, state):
        states, said = [], []
        for i in range(self.n):
            flow, (new, aux) = self._step(flow, tokens, i, None if state is None else state[i])
            states.append(new)
            said.append(aux)
        return flow, None if state is None else tuple(states), _stack(*said)

    def _scan(self, flow, tokens, state):
        step = lambda flow, now: self._step(flow, tokens, *now)
        if state is None:
            step = jax.checkpoint(step)  # keep only the stream between steps; recompute the rest in the backward pass
        steps, first = (jnp.arange(self.n), state), None
        if jax.eval_shape(step, flow, _at(steps, 0))[0].provided.keys() != flow.provided.keys():
            # The loop's carry must keep its form, and the unit publishes: the first step runs before the loop.
            flow, first = step(flow, _at(steps, 0))
            steps = _at(steps, slice(1, None))
        flow, (state, aux) = jax.lax.scan(step, flow, steps)
        if first is not None:
            state, aux = jax.tree.map(lambda one, rest: jnp.concatenate([one[None], rest]), first, (state, aux))
        return flow, state, aux


def _at(steps, index):
    return jax.tree.map(lambda a: a[index], steps)


def _stack(*said):
    return jax.tree.map(lambda *steps: jnp.stack(steps), *said)
