"""Decoding of Mixture-of-Recursions in continuous depth-wise batches: requests at different recursions share a batch.

Bae et al. 2025 (arXiv:2507.10524), section 2.2; Bae et al. 2024 (arXiv:2410.20672), section 3.8. In lock-step a token
that is done waits for the deepest one of its batch. Here as many requests are in flight as there are rows, each at a
recursion of its own. The unit is applied to those rows that are ready for it, a fixed number at a time; who has taken
all its recursions waits for the rest of the network (the layers behind, the head, and with the next token those in
front), which is run for several rows together too. A request that has ended leaves its row to the next of the queue.
What a request's text is does not depend on its company.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from archlab.depth.depth_choice import DepthChoice, last_alone
from archlab.depth.mixture_of_recursions import MixtureOfRecursionsModule
from archlab.depth.routing import choose_within_budget
from archlab.inference.admission import Request, admitted, around_recursion, find_recursion
from archlab.inference.lanes import lanes_of, look, replace_row, settle
from archlab.inference.sampling import Sampling, sample
from archlab.layers.contract import Tokens, pytree
from archlab.layers.repeat import unstack
from archlab.layers.weights import merge, split
from archlab.model import Model


class Finished(NamedTuple):
    """index: the request's place in the queue. tokens [N]: what is new, with the token that ended it, if one did.
    depths [N]: how many recursions were taken to find each of them."""

    index: int
    tokens: Int[np.ndarray, "N"]
    depths: Int[np.ndarray, "N"]


@pytree
class Work:
    """What was run: applications of the unit and of the rest of the network, and how many tokens they were for."""

    unit_calls: Int[Array, ""]
    unit_tokens: Int[Array, ""]
    rest_calls: Int[Array, ""]
    rest_tokens: Int[Array, ""]


@pytree
class Flight:
    """All that is in flight, B rows: the memory of the layers around the recursion, and the unit's, as lanes.

    Of the token that each row is at: token, place in its document, x (the stream), first (the stream before all
    recursions), depth (recursions taken), goal (how many it takes, as far as that is settled), gates [B, n] (of the
    recursions up to there), since (when it began to wait). passed [B, n]: as in `RecursionState`. Of its request: alive
    (in flight), fresh (its prompt's last token has not entered yet), number, limit (of new tokens), made (so far), text
    and depths [B, max_length].
    """

    around: Any
    unit: Any
    token: Int[Array, "B"]
    place: Int[Array, "B"]
    x: Float[Array, "B D"]
    first: Float[Array, "B D"]
    depth: Int[Array, "B"]
    goal: Int[Array, "B"]
    gates: Float[Array, "B n"]
    since: Int[Array, "B"]
    passed: Int[Array, "B n"]
    alive: Bool[Array, "B"]
    fresh: Bool[Array, "B"]
    number: Int[Array, "B"]
    limit: Int[Array, "B"]
    made: Int[Array, "B"]
    text: Int[Array, "B S"]
    depths: Int[Array, "B S"]
    work: Work

    @property
    def for_unit(self) -> Bool[Array, "B"]:
        return self.alive & (self.depth < self.goal)

    @property
    def for_rest(self) -> Bool[Array, "B"]:
        return self.alive & (self.depth == self.goal)


class _Choice(NamedTuple):
    """What decides about tokens: a key; `Sampling.as_arrays`; the ids that end a text [E]."""

    key: jax.Array
    sampling: Sampling
    eos: np.ndarray


class DepthwiseDecoder:
    """Decodes a queue of requests with a model whose body is a `MixtureOfRecursions`, or a `Sequence` with one in it.

    rows: B, the requests in flight. max_length: the most tokens of a prompt and its continuation; it is declared to
    positions that depend on the length. unit_rows, rest_rows: how many rows one application takes, at most; None for
    5/8 and 3/8 of all. While there is a queue all applications are full where the two sum to no more than rows + 1.
    Both as many as the rows is lock-step: nobody goes on before all others are done.

    `work` is what the last `run` has taken so far. Raises: ValueError for models that it cannot decode (each recursion
    owns weights; values are published for later layers) and for settings out of their range.
    """

    def __init__(self, model: Model, rows: int = 32, max_length: int = 512, unit_rows: int | None = None,
                 rest_rows: int | None = None):
        unit_rows = max(1, 5 * rows // 8) if unit_rows is None else unit_rows
        rest_rows = max(1, 3 * rows // 8) if rest_rows is None else rest_rows
        for name, value, most in [("rows", rows, None), ("max_length", max_length, model.config.body.longest),
                                  ("unit_rows", unit_rows, rows), ("rest_rows", rest_rows, rows)]:
            if not isinstance(value, int) or value < 1 or most is not None and value > most:
                bounds = "at least 1" if most is None else f"from 1 to {most}"
                raise ValueError(f"{name} = {value!r}: must be a whole number, {bounds}")
        self.model_config, self.rows, self.max_length = model.config, rows, max_length
        self._middle = find_recursion(model, max_length)
        self.takes = unit_rows, rest_rows
        structure, parameters, rest = split(unstack(model))
        self._structure, self._weights, self.work = structure, (parameters, rest), None
        self._begin = jax.jit(self._empty)
        self._board = jax.jit(self._admit, donate_argnums=1)
        self._fly = jax.jit(self._until_one_ends, donate_argnums=1)

    def run(self, requests: Iterable[Request | tuple], *, eos: int | tuple[int, ...] | None = None,
            rngs: nnx.Rngs | None = None, **sampling) -> Iterator[Finished]:
        """Yields what has finished, as it does.

        Args: requests: `Request`s, or pairs of the same; taken from the iterable as rows become free. eos: the token,
          or several, that ends a text. rngs: where chance comes from: a token's depends on the request's place in the
          queue and on the token's in the text alone. sampling: fields of `Sampling` (temperature 0.8 unless told; 0 is
          greedy), but for repetition_penalty.
        Raises: ValueError for settings out of their range and requests that do not fit: of a list at once, of any other
          iterable when its turn comes.
        """
        vocab, sampling = self.model_config.vocab, Sampling(**sampling)
        sampling.check(vocab)
        if sampling.repetition_penalty is not None:
            raise ValueError("repetition_penalty: is not known to depth-wise decoding; leave it None")
        ends = np.asarray([] if eos is None else eos).reshape(-1)
        if ends.size and (ends.dtype.kind not in "iu" or ends.min() < 0 or ends.max() >= vocab):
            raise ValueError(f"eos = {eos!r}: must be of the vocabulary, from 0 to {vocab - 1}")
        choice = _Choice((nnx.Rngs(0) if rngs is None else rngs).sample(), sampling.as_arrays(), ends.astype(np.int32))
        check = lambda pair: (pair[0], admitted(*pair, vocab, self.max_length))
        if isinstance(requests, (list, tuple)):
            requests = list(requests)
            for pair in enumerate(requests):
                check(pair)
        return self._finished(map(check, enumerate(requests)), choice)

    def _finished(self, queue: Iterator, choice: _Choice) -> Iterator[Finished]:
        flight, alive = self._begin(self._weights), np.zeros(self.rows, bool)
        while True:
            for row in np.flatnonzero(~alive):
                number, request = next(queue, (None, None))
                if request is None:
                    break
                flight, alive[row] = self._board(self._weights, flight, *request, np.int32(row), np.int32(number)), True
            if not alive.any():
                break
            flight = self._fly(self._weights, flight, choice)
            now, number, made, text, depths, self.work = jax.device_get(
                (flight.alive, flight.number, flight.made, flight.text, flight.depths, flight.work))
            for row in np.flatnonzero(alive & ~now):
                yield Finished(int(number[row]), text[row, :made[row]], depths[row, :made[row]])
            alive = now.copy()

    # What follows is compiled.

    def _empty(self, weights) -> Flight:
        """Nothing in flight."""
        model, B, none = merge(self._structure, *weights), self.rows, jnp.int32(0)
        around, unit, state = self._memory(model.init_state(B, self.max_length).body)
        numbers = lambda *shape: jnp.zeros((B, *shape), jnp.int32)
        stream, no = jnp.zeros((B, self.model_config.width), model.compute_dtype), numbers() > 0
        gates = jnp.zeros(state.passed.shape, stream.dtype)
        return Flight(around, unit, numbers(), numbers(), stream, stream, numbers(), numbers(), gates, numbers(),
                      state.passed, no, no, numbers(), numbers(), numbers(), numbers(self.max_length),
                      numbers(self.max_length), Work(none, none, none, none))

    def _memory(self, body):
        """The memory of a state of the body: of the layers around, of the unit, and the recursion's own numbers."""
        before, state, after = around_recursion(body, self._middle)
        return (lanes_of((before,)), lanes_of((after,))), lanes_of(state.units), state

    def _admit(self, weights, flight: Flight, prompt, length, limit, row, number) -> Flight:
        """A request in a row: all of its prompt but the last token is read, which is the next to enter."""
        model = merge(self._structure, *weights)
        segments = (jnp.arange(prompt.size) < length - 1).astype(jnp.int32)
        state = model.init_state(1, self.max_length)
        state = model(prompt[None], state, segment_ids=segments[None], logits="none").state
        around, unit, recursion = self._memory(state.body)
        put = lambda a, value: a.at[row].set(value)
        return dataclasses.replace(
            flight, around=replace_row(flight.around, row, around), unit=replace_row(flight.unit, row, unit),
            token=put(flight.token, prompt[length - 1]), place=put(flight.place, length - 1),
            passed=put(flight.passed, recursion.passed[0]), depth=put(flight.depth, 0), goal=put(flight.goal, 0),
            since=put(flight.since, flight.work.unit_calls + flight.work.rest_calls), alive=put(flight.alive, True),
            fresh=put(flight.fresh, True), number=put(flight.number, number), limit=put(flight.limit, limit),
            made=put(flight.made, 0))

    def _until_one_ends(self, weights, flight: Flight, choice: _Choice) -> Flight:
        model = merge(self._structure, *weights)
        before, mixture, after = around_recursion(model.body, self._middle)

        def turn(flight):
            flight = jax.lax.while_loop(lambda f: f.for_unit.any() & (f.for_rest.sum() < self.takes[1]),
                                        lambda f: self._recur(mixture, f), flight)
            return self._renew(model, before, mixture, after, flight, choice)

        return jax.lax.while_loop(lambda f: (f.alive == flight.alive).all() & f.alive.any(), turn, flight)

    def _recur(self, mixture: MixtureOfRecursionsModule, flight: Flight) -> Flight:
        """One application of the unit, to those who have waited longest; each then knows whether it goes on."""
        rows, live = _longest_waiting(flight.for_unit, flight.since, self.takes[0])
        mine = lambda a: a[rows]
        depth, tokens = mine(flight.depth), self._tokens(live, mine(flight.place))
        once, shared = isinstance(mixture.config.router, DepthChoice), mixture.config.cache == "shared"
        recursion = jnp.minimum(depth, mixture.config.n - 1)  # who does not live may be past the last
        lanes = rows, jnp.zeros_like(depth) if shared else recursion
        writes = depth == 0 if shared else jnp.ones_like(live)  # later recursions look at what the first one kept
        y, state, _ = mixture.unit(mine(flight.x)[:, None], tokens, look(flight.unit, *lanes, writes))
        gate = jnp.take_along_axis(mine(flight.gates), recursion[:, None], 1).astype(y.dtype)
        y, depth, settled = gate * y[:, 0], depth + 1, {}
        if once:
            x = jnp.where((depth == mine(flight.goal))[:, None], y + mine(flight.first), y)
        else:
            x = mine(flight.x) + y
            goal, gates, passed = _next_choice(mixture, x, depth, range(1, mixture.config.n), tokens,
                                               mine(flight.passed))
            settled = {"goal": goal, "gates": gates, "passed": passed}
        work = dataclasses.replace(flight.work, unit_calls=flight.work.unit_calls + 1,
                                   unit_tokens=flight.work.unit_tokens + live.sum(dtype=jnp.int32))
        return _set(flight, rows, live, x=x, depth=depth, **settled,
                    since=jnp.broadcast_to(work.unit_calls + work.rest_calls, rows.shape),
                    unit=settle(flight.unit, state, *lanes), work=work)

    def _renew(self, model: Model, before, mixture, after, flight: Flight, choice: _Choice) -> Flight:
        """From the end of the recursions through the rest of the network to the next token's first recursion."""
        rows, live = _longest_waiting(flight.for_rest, flight.since, self.takes[1])
        mine, lanes, yes = lambda a: a[rows], (rows, jnp.zeros_like(rows)), jnp.ones_like(live)
        place, fresh, made = mine(flight.place), mine(flight.fresh), mine(flight.made)
        new = live & ~fresh
        x, tokens = mine(flight.x)[:, None], self._tokens(new, place)
        x, ending = _through(after, x, tokens, look(flight.around[1], *lanes, yes))
        logits = model.logits(x if model.norm is None else model.norm(x))[:, 0]
        token = jnp.where(fresh, mine(flight.token), _draw(logits, mine(flight.number), made, choice))
        slot = jnp.where(new, made, self.max_length)  # an index past the end is dropped
        note = lambda a, value: a.at[rows, slot].set(value, mode="drop")
        text, depths = note(flight.text, token), note(flight.depths, mine(flight.depth))
        made, place = made + new, place + new
        ended = new & ((made >= mine(flight.limit)) | (token[:, None] == choice.eos).any(1))

        tokens = self._tokens(live & ~ended, place)
        x = model.embed(token[:, None], model.compute_dtype) * model.config.embedding_scale
        x, beginning = _through(before, x, tokens, look(flight.around[0], *lanes, yes))
        x, depth = x[:, 0], jnp.zeros_like(rows)
        goal, gates, passed = (_only_choice(mixture, x, tokens, mine(flight.passed)) if mixture.router is not None else
                               _next_choice(mixture, x, depth, range(1), tokens, mine(flight.passed)))
        work = dataclasses.replace(flight.work, rest_calls=flight.work.rest_calls + 1,
                                   rest_tokens=flight.work.rest_tokens + live.sum(dtype=jnp.int32))
        around = tuple(settle(memory, state, *lanes) for memory, state in zip(flight.around, (beginning, ending)))
        return _set(flight, rows, live, token=token, place=place, x=x, first=x, depth=depth, goal=goal, gates=gates,
                    passed=passed, alive=~ended, fresh=jnp.zeros_like(fresh), made=made,
                    since=jnp.broadcast_to(work.unit_calls + work.rest_calls, rows.shape),
                    around=around, text=text, depths=depths, work=work)

    def _tokens(self, live: Bool[Array, "W"], place: Int[Array, "W"]) -> Tokens:
        """One token a row, padding where nothing is alive."""
        return Tokens(live[:, None].astype(jnp.int32), place[:, None], context_length=jnp.int32(self.max_length))


def _only_choice(mixture: MixtureOfRecursionsModule, x: Float[Array, "W D"], tokens: Tokens, passed: Int[Array, "W n"]):
    """`DepthChoice`, settled as a token enters: how many recursions it takes, their gates [W, n]; and `passed`."""
    choice, active, goal, counts = mixture.router(x[:, None], tokens), tokens.real, 0, []
    for r, room in enumerate(mixture.rooms):
        active, count = choose_within_budget(active & (choice.wanted > r), room, tokens.positions, tokens.real,
                                             passed[:, r])
        goal = goal + active[:, 0].astype(jnp.int32)
        counts.append(count)
    return goal, last_alone(choice.gates[:, 0], goal).astype(x.dtype), jnp.stack(counts, 1)


def _next_choice(mixture: MixtureOfRecursionsModule, x: Float[Array, "W D"], depth: Int[Array, "W"], among: range,
                 tokens: Tokens, passed: Int[Array, "W n"]):
    """Who of those that have taken `depth` recursions, one of `among` or all there are, takes one more: the goal that
    it then has; the gate, as [W, n]; and `passed`."""
    goal, gate = depth, jnp.zeros(depth.shape, x.dtype)
    for r in among:
        here = (depth == r)[:, None] & tokens.real
        choice = mixture.routers[r](x[:, None], here, mixture.shares[r], mixture.rooms[r], tokens.positions, tokens,
                                    passed[:, r], look_ahead=False)
        goal, gate = goal + choice.chosen[:, 0], gate + choice.gate[:, 0].astype(gate.dtype)
        passed = passed.at[:, r].set(jnp.where(here[:, 0], choice.passed, passed[:, r]))
    return goal, jnp.broadcast_to(gate[:, None], passed.shape), passed


def _longest_waiting(waiting: Bool[Array, "B"], since: Int[Array, "B"], take: int):
    """Rows [W] that have waited longest, all in their order if that many are asked for; and which of them wait at all.
    """
    if take == waiting.size:
        return jnp.arange(take, dtype=jnp.int32), waiting
    rows = jnp.argsort(jnp.where(waiting, since, jnp.iinfo(jnp.int32).max))[:take].astype(jnp.int32)
    return rows, waiting[rows]


def _set(flight: Flight, rows, live, work: Work, **fields) -> Flight:
    """The flight with new values [W, ...] for rows that live; memory and texts, which are whole, are replaced."""
    whole = ("around", "unit", "text", "depths")
    where = jnp.where(live, rows, flight.alive.size)  # an index past the end is dropped
    put = lambda name, value: value if name in whole else getattr(flight, name).at[where].set(value, mode="drop")
    return dataclasses.replace(flight, work=work, **{name: put(name, value) for name, value in fields.items()})


def _through(layers: list, x, tokens: Tokens, states: tuple):
    """Layers one after another, as `Sequence` runs them."""
    after = []
    for layer, state in zip(layers, states):
        x, state, _ = layer(x, tokens, state)
        after.append(state)
    return x, tuple(after)


def _draw(logits: Float[Array, "W V"], number, made, choice: _Choice) -> Int[Array, "W"]:
    """A token for each row, by a key of its request and its place in the text."""
    if choice.sampling.temperature is None:
        return sample(logits, None, choice.sampling)
    keys = jax.vmap(lambda *index: jax.random.fold_in(jax.random.fold_in(choice.key, index[0]), index[1]))(number, made)
    return jax.vmap(lambda logits, key: sample(logits[None], key, choice.sampling)[0])(logits, keys)
