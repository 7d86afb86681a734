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

from archlab.analysis.flops import count
from archlab.depth.depth_choice import DepthChoice
from archlab.depth.mixture_of_recursions import MixtureOfRecursions, MixtureOfRecursionsModule
from archlab.depth.routing import choose_within_budget
from archlab.inference.lanes import lanes_of, look, replace_row, settle
from archlab.inference.sampling import Sampling, sample
from archlab.layers.alphabet import variables_of
from archlab.layers.contract import Tokens, pytree
from archlab.layers.repeat import unstack
from archlab.layers.sequence import Sequence
from archlab.layers.weights import merge, split
from archlab.model import LanguageModel, Model

PROMPT = 16  # the shortest prompt that a program is compiled for
BATCH = 7919  # of a state whose shapes alone are looked at: a number that no layer has


class Request(NamedTuple):
    """prompt: token ids, at least one. new_tokens: how many to add."""

    prompt: Any
    new_tokens: int


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
    recursions), depth (recursions taken), gate (of the recursion it goes on to), ready (for the unit; else for the
    rest), since (when it began to wait). passed [B, n]: as in `RecursionState`. Of its request: alive (in flight),
    fresh (its prompt's last token has not entered yet), number, limit (of new tokens), made (so far), text and depths
    [B, max_length].
    """

    around: Any
    unit: Any
    token: Int[Array, "B"]
    place: Int[Array, "B"]
    x: Float[Array, "B D"]
    first: Float[Array, "B D"]
    depth: Int[Array, "B"]
    gate: Float[Array, "B"]
    ready: Bool[Array, "B"]
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
        return self.alive & self.ready

    @property
    def for_rest(self) -> Bool[Array, "B"]:
        return self.alive & ~self.ready


class _Choice(NamedTuple):
    """What decides about tokens: a key; `Sampling.as_arrays`; the ids that end a text [E]."""

    key: jax.Array
    sampling: Sampling
    eos: np.ndarray


class DepthwiseDecoder:
    """Decodes a queue of requests with a model whose body is a `MixtureOfRecursions`, or a `Sequence` with one in it.

    rows: B, the requests in flight. max_length: the most tokens of a prompt and its continuation; it is declared to
    positions that depend on the length. unit_rows, rest_rows: how many rows one application takes, at most; None for
    3/4 and 1/4 of all. While there is a queue all applications are full where the two sum to no more than rows + 1.
    Both as many as the rows is lock-step: nobody goes on before all others are done.

    `work` is what the last `run` has taken so far. Raises: ValueError for models that it cannot decode (each recursion
    owns weights; values are published for later layers) and for settings out of their range.
    """

    def __init__(self, model: Model, rows: int = 32, max_length: int = 512, unit_rows: int | None = None,
                 rest_rows: int | None = None):
        unit_rows = max(1, 3 * rows // 4) if unit_rows is None else unit_rows
        rest_rows = max(1, rows // 4) if rest_rows is None else rest_rows
        for name, value, most in [("rows", rows, None), ("max_length", max_length, model.config.body.longest),
                                  ("unit_rows", unit_rows, rows), ("rest_rows", rest_rows, rows)]:
            if not isinstance(value, int) or value < 1 or most is not None and value > most:
                raise ValueError(f"{name} = {value!r}: must be a whole number from 1 to {most or 'any'}")
        self.model_config, self.rows, self.max_length = model.config, rows, max_length
        self._middle = _check(model, max_length)
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
          queue and on the token's in the text alone. sampling: fields of `Sampling`, but for repetition_penalty.
        """
        vocab, sampling = self.model_config.vocab, Sampling(**sampling)
        sampling.check(vocab)
        if sampling.repetition_penalty is not None:
            raise ValueError("repetition_penalty: is not known to depth-wise decoding; leave it None")
        ends = np.asarray([] if eos is None else eos).reshape(-1)
        if ends.size and (ends.dtype.kind not in "iu" or ends.min() < 0 or ends.max() >= vocab):
            raise ValueError(f"eos = {eos!r}: must be of the vocabulary, from 0 to {vocab - 1}")
        choice = _Choice((nnx.Rngs(0) if rngs is None else rngs).sample(), sampling.as_arrays(), ends.astype(np.int32))
        queue = enumerate(self._checked(request) for request in requests)
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

    def _checked(self, request: Request | tuple):
        """The arguments of a request for `_admit`, its prompt padded to a power of two."""
        prompt, new = request
        prompt, vocab = np.asarray(prompt), self.model_config.vocab
        if prompt.ndim != 1 or not prompt.size or prompt.dtype.kind not in "iu":
            raise ValueError(f"a prompt of shape {prompt.shape} and type {prompt.dtype}: must be whole numbers [P], "
                             "one at the least")
        if prompt.min() < 0 or prompt.max() >= vocab:
            raise ValueError(f"a prompt with ids from {prompt.min()} to {prompt.max()}: must lie in [0, {vocab})")
        if not isinstance(new, (int, np.integer)) or new < 1 or prompt.size + new > self.max_length:
            raise ValueError(f"new_tokens = {new!r}: must be at least 1, and with the {prompt.size} of the prompt at "
                             f"most max_length = {self.max_length}")
        padding = min(max(PROMPT, 1 << (prompt.size - 1).bit_length()), self.max_length) - prompt.size
        return np.pad(prompt, (0, padding)).astype(np.int32), np.int32(prompt.size), np.int32(new)

    def flops(self) -> tuple[float, float]:
        """Floating-point operations of one application of the unit, and of the rest."""
        flight = jax.eval_shape(self._empty, self._weights)
        choice = _Choice(None, Sampling(None), np.zeros(0, np.int32))

        def parts(weights):
            model = merge(self._structure, *weights)
            return model, *_around(_layers(model), self._middle)

        unit = lambda weights, flight: self._recur(parts(weights)[2], flight)
        rest = lambda weights, flight: self._renew(*parts(weights), flight, choice)
        return tuple(count(program, self._weights, flight).total for program in (unit, rest))

    # What follows is compiled.

    def _empty(self, weights) -> Flight:
        """Nothing in flight."""
        model, B, none = merge(self._structure, *weights), self.rows, jnp.int32(0)
        around, unit, state = self._memory(model.init_state(B, self.max_length).body)
        numbers = lambda *shape: jnp.zeros((B, *shape), jnp.int32)
        stream, no = jnp.zeros((B, self.model_config.width), model.compute_dtype), numbers() > 0
        return Flight(around, unit, numbers(), numbers(), stream, stream, numbers(), stream[:, 0], no, numbers(),
                      state.passed, no, no, numbers(), numbers(), numbers(), numbers(self.max_length),
                      numbers(self.max_length), Work(none, none, none, none))

    def _memory(self, body):
        """The memory of a state of the body: of the layers around, of the unit, and the recursion's own numbers."""
        before, state, after = _around(body, self._middle)
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
            passed=put(flight.passed, recursion.passed[0]), ready=put(flight.ready, False),
            since=put(flight.since, flight.work.unit_calls + flight.work.rest_calls), alive=put(flight.alive, True),
            fresh=put(flight.fresh, True), number=put(flight.number, number), limit=put(flight.limit, limit),
            made=put(flight.made, 0))

    def _until_one_ends(self, weights, flight: Flight, choice: _Choice) -> Flight:
        model = merge(self._structure, *weights)
        before, mixture, after = _around(_layers(model), self._middle)

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
        lanes = rows, jnp.zeros_like(depth) if shared else jnp.minimum(depth, mixture.config.n - 1)
        writes = depth == 0 if shared else jnp.ones_like(live)  # later recursions look at what the first one kept
        y, state, _ = mixture.unit(mine(flight.x)[:, None], tokens, look(flight.unit, *lanes, writes))
        y = mine(flight.gate)[:, None].astype(y.dtype) * y[:, 0]
        x, depth = y if once else mine(flight.x) + y, depth + 1
        first, passed = mine(flight.first), mine(flight.passed)
        goes, gate, passed = self._decide(mixture, x, first, depth, tokens, passed)
        if once:
            x = jnp.where(goes[:, None], x, x + first)
        work = dataclasses.replace(flight.work, unit_calls=flight.work.unit_calls + 1,
                                   unit_tokens=flight.work.unit_tokens + live.sum(dtype=jnp.int32))
        return _set(flight, rows, live, x=x, depth=depth, gate=gate, ready=goes, passed=passed,
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
        goes, gate, passed = self._decide(mixture, x, x, depth, tokens, mine(flight.passed))
        work = dataclasses.replace(flight.work, rest_calls=flight.work.rest_calls + 1,
                                   rest_tokens=flight.work.rest_tokens + live.sum(dtype=jnp.int32))
        around = tuple(settle(memory, state, *lanes) for memory, state in zip(flight.around, (beginning, ending)))
        return _set(flight, rows, live, token=token, place=place, x=x, first=x, depth=depth, gate=gate, ready=goes,
                    passed=passed, alive=~ended, fresh=jnp.zeros_like(fresh), made=made,
                    since=jnp.broadcast_to(work.unit_calls + work.rest_calls, rows.shape),
                    around=around, text=text, depths=depths, work=work)

    def _tokens(self, live: Bool[Array, "W"], place: Int[Array, "W"]) -> Tokens:
        """One token a row, padding where nothing is alive."""
        return Tokens(live[:, None].astype(jnp.int32), place[:, None], context_length=jnp.int32(self.max_length))

    def _decide(self, mixture: MixtureOfRecursionsModule, x, first, depth: Int[Array, "W"], tokens: Tokens,
                passed: Int[Array, "W n"]):
        """Whether tokens that have taken `depth` recursions take one more; its gate; and `passed` with it."""
        goes, gate, counts = jnp.zeros(depth.shape, bool), jnp.zeros(depth.shape, x.dtype), []
        chosen_once = None if mixture.router is None else mixture.router(first[:, None], tokens)
        for r, (share, room) in enumerate(zip(mixture.shares, mixture.rooms)):
            here, places = (depth == r)[:, None] & tokens.real, tokens.positions
            if chosen_once is not None:
                wish = here & (chosen_once.wanted > r)
                chosen, count = choose_within_budget(wish, room, places, tokens.real, passed[:, r])
                weight = jnp.where(here, chosen_once.gates[:, :, r], 0)
            else:
                chosen, weight, count, *_ = mixture.routers[r](x[:, None], here, share, room, places, tokens,
                                                               passed[:, r], look_ahead=False)
            goes, gate = goes | chosen[:, 0], gate + weight[:, 0].astype(gate.dtype)
            counts.append(jnp.where(here[:, 0], count, passed[:, r]))
        return goes, gate, jnp.stack(counts, 1)


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


def _layers(model: Model):
    """What the body is made of, as its state is."""
    return tuple(model.body.layers) if isinstance(model.config.body, Sequence) else model.body


def _around(parts, middle: int | None):
    """What is before the recursion, itself, and what is behind; `parts` is itself where `middle` is None."""
    return ((), parts, ()) if middle is None else (parts[:middle], parts[middle], parts[middle + 1:])


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


def _check(model: Model, max_length: int) -> int | None:
    """Where in the body's `Sequence` the recursion is; None where it is the body. Raises ValueError."""
    body = getattr(model.config, "body", None)
    layers = body.layers if isinstance(body, Sequence) else (body,)
    found = [i for i, layer in enumerate(layers) if isinstance(layer, MixtureOfRecursions)]
    if not isinstance(model.config, LanguageModel) or len(found) != 1:
        raise ValueError("depth-wise decoding wants a language model whose body is one MixtureOfRecursions, or a "
                         f"Sequence with one among its layers: not {type(body).__name__} with {len(found)}")
    if not body.causal:
        raise ValueError("depth-wise decoding: the model sees both ways, so it has no next token to give")
    middle = found[0] if isinstance(body, Sequence) else None
    before, mixture, after = _around(_layers(model), middle)
    for path, variable in variables_of(mixture.unit).items():
        if variable.get_metadata().get("own", False):
            raise ValueError(f"depth-wise decoding: each recursion owns its {path}, so that different recursions "
                             "cannot share a batch")
    one = jnp.ones((1, 1), jnp.int32)
    x = jax.ShapeDtypeStruct((1, 1, model.config.width), model.compute_dtype)
    for layer in (*before, *after):
        if published := jax.eval_shape(lambda x: layer(x, Tokens(one, one))[2], x).provides:
            raise ValueError(f"depth-wise decoding: values published for later layers ({', '.join(published)}) do not "
                             "stay with their token")
    state = jax.eval_shape(lambda: model.init_state(BATCH, max_length).body)
    if any(leaf.shape[0] != BATCH for leaf in jax.tree.leaves(state)):
        raise ValueError("depth-wise decoding: states are stacked over the copies of a Repeat: give it scan=False")
    return middle
