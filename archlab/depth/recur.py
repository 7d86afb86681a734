"""Recurrence in depth: one unit, applied again and again to what it made."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.attention.cache import KVCache
from archlab.depth.coordinates import Coordinates
from archlab.depth.gather import through
from archlab.depth.halting import ACT, Halting
from archlab.depth.own import join_updates, of_recursion, recurring
from archlab.layers.alphabet import reuse
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, pytree


class Recur(LayerConfig):
    """`unit` applied `n` times with one set of weights; each step has a state of its own.

    What is marked by `Own` or `LowRank` in the unit, each step has for itself (relaxed recursive transformers).

    With `signal` and `halting` this is the Universal Transformer (Dehghani et al. 2018, arXiv:1807.03819). A token
    that halts keeps its stream as it is from then on. Where the unit has keys and values, later steps still write
    those of that stream, so that tokens that run longer, also ones yet to come, find them. Any other unit skips halted
    tokens wholly. Both are causal and equal under every split through a state.

    Outside the training form, a step at which no token runs any more computes no output: with keys and values it
    writes these and nothing else, without it does nothing.

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
    """Weights: the unit's, own ones stacked over the steps; the halting's. State: stacked over the steps where scanned,
    a tuple of n where unrolled. Losses, traces and policies of the unit are stacked over the steps: 0 for a step that
    was not computed, and for a token that was skipped. Its updates are summed where variables are shared.
    """

    def __init__(self, config: Recur, rngs: nnx.Rngs, at: Place):
        self.n, self.signal, self.causal = config.n, config.signal, config.unit.causal
        self.scanned = jax.default_backend() != "cpu" if config.scan is None else config.scan
        self.unit = recurring(config.unit, config.n, rngs, at)
        self.halting = None if config.halting is None else config.halting.build(rngs, at)
        if self.halting is not None:
            reuse(self.halting, config.n)

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        units = [of_recursion(self.unit, i) for i in range(self.n)]
        states = tuple(unit.init_state(batch, max_length, dtype, memory) for unit in units)
        return jax.tree.map(lambda *steps: jnp.stack(steps), *states) if self.scanned else states

    def __call__(self, x, tokens: Tokens, state=None):
        start = None if self.halting is None else self.halting.start(x, tokens)
        run = self._scan if self.scanned else self._unroll
        end, state, said = run(Flow(x, start, tokens.provided), tokens, state)
        aux = dataclasses.replace(said, updates=join_updates(self.unit, said.updates)).under("unit")
        if self.halting is None:
            return end.x, state, aux
        return end.halting.output, state, aux | self.halting.said(end.halting, tokens).under("halting")

    def _step(self, flow: Flow, tokens: Tokens, i, state) -> tuple[Flow, tuple[Any, Aux]]:
        if self.halting is None or tokens.training is not None:
            return self._compute(flow, tokens, i, state)
        compute = lambda: self._compute(flow, tokens, i, state)
        return jax.lax.cond(flow.halting.running.any(), compute, lambda: self._pass(compute, flow, tokens, state))

    def _compute(self, flow: Flow, tokens: Tokens, i, state) -> tuple[Flow, tuple[Any, Aux]]:
        unit, before = of_recursion(self.unit, i), flow.x
        if self.signal is not None:
            before = before + self.signal.signal(before, tokens, i)
        inner = dataclasses.replace(tokens.provide(flow.provided).fold(i), last_only=False)
        if self.halting is None or self._has_keys(tokens):
            after, state, aux = unit(before, inner, state)
        else:
            after, state, aux = _without_halted(unit, before, flow.halting.running, inner, state)
        provided = {**flow.provided, **aux.provides}
        aux = aux.within()
        if self.halting is None:
            return Flow(after, None, provided), (state, aux)
        halting = self.halting.update(flow.halting, before, after)
        return Flow(jnp.where(flow.halting.running[:, :, None], after, flow.x), halting, provided), (state, aux)

    def _pass(self, compute, flow: Flow, tokens: Tokens, state) -> tuple[Flow, tuple[Any, Aux]]:
        """What a step gives at which no token runs: the stream as it was, keys and values written where there are any.

        That is the same computation of which only the state and what it publishes are used. The compiler removes the
        rest: of a unit of one block its norm and its key and value projections remain.
        """
        made, (written, said) = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(compute))
        provided = {**made.provided, **flow.provided}
        if jax.tree.leaves(written) and self._has_keys(tokens):
            made, (written, _) = compute()
            provided = made.provided
        elif state is not None:
            written = state
        return Flow(flow.x, flow.halting, provided), (written, said)

    def _has_keys(self, tokens: Tokens) -> bool:
        """Whether the unit's tokens look at each other's keys: a halted token must then still show its own."""
        init = lambda memory: of_recursion(self.unit, 0).init_state(1, 1, jnp.float32, memory)
        state = jax.eval_shape(init, tokens.memory)
        is_cache = lambda node: isinstance(node, KVCache)
        return not self.causal or any(map(is_cache, jax.tree.leaves(state, is_leaf=is_cache)))

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


def _without_halted(unit: Layer, x, running, tokens: Tokens, state):
    """The unit over the running tokens alone, who close up; what it says of single tokens is put where they stand."""
    B, T = running.shape
    y, state, aux = through(unit, x, running, T, tokens, state)
    back = jnp.argsort(jnp.argsort(~running, axis=1, stable=True), axis=1)

    def home(a, axis: int, elsewhere):
        shape = [1] * a.ndim
        shape[axis:axis + 2] = B, T
        moved = jnp.take_along_axis(a, back.reshape(shape), axis + 1)
        return jnp.where(running.reshape(shape), moved, elsewhere)

    traces = {name: home(a, a.ndim - 2, 0) if a.shape[-2:] == (B, T) else a for name, a in aux.traces.items()}
    provides = {name: home(a, 0, tokens.provided.get(name, 0)) if a.shape[:2] == (B, T) else a
                for name, a in aux.provides.items()}
    return y, state, dataclasses.replace(aux, traces=traces, provides=provides)


def _at(steps, index):
    return jax.tree.map(lambda a: a[index], steps)


def _stack(*said):
    return jax.tree.map(lambda *steps: jnp.stack(steps), *said)
