"""Text from a model: a prefill of the whole prompt, then one token after another.

Nothing is compiled twice. Prompts are padded to powers of two; caches double when they are full, the last time by no
more than what is still to come asks for, to a quarter of a power of two. Each size is one program that runs any number
of steps. So the number of programs grows with the logarithm of the length, and a decode step reads little more of the
cache than it needs.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from archlab.encoder_decoder import EncoderDecoder
from archlab.inference.sampling import Sampling, sample
from archlab.layers.repeat import unstack
from archlab.layers.weights import merge, split
from archlab.model import Model

NO_LIMIT = 2**30  # tokens
PROMPT, SLOTS = 16, 256  # the shortest prompt and the smallest cache that a program is compiled for


def generate(model: Model, prompt_ids: Int[Array, "B P"], max_new_tokens: int = 64, *, rngs: nnx.Rngs | None = None,
             segment_ids: Int[Array, "B P"] | None = None, eos: int | Sequence[int] | None = None,
             first: int | None = None, last: int | None = None, **sampling) -> Int[Array, "B P+N"]:
    """Continues each prompt by `max_new_tokens` (N) tokens; an encoder-decoder reads it, and writes a text of its own.

    Args:
      model: copies of a `Repeat` are taken apart here; pass `unstack(model)` to have that done once for many calls.
      prompt_ids: token ids; rows of unequal length are padded, left or right, where `segment_ids` is 0.
      rngs: where chance comes from; None for `nnx.Rngs(0)`.
      segment_ids: as for the model, 0 for padding; what is new belongs to each row's last document.
      eos: the token, or several, that ends a row: it is repeated to the row's end, and the work stops when all rows
        have ended.
      first, last: tokens that the first and the last of the N must be, whatever the model says; None for its choice.
      sampling: fields of `Sampling`: temperature (0.8; 0 is greedy), top_k, top_p, min_p, repetition_penalty.

    Returns: the prompts as given, padding too, and after them what is new; of an encoder-decoder what is new [B, N].
    Raises: ValueError for an empty prompt, ids outside the vocabulary, and settings out of their range.
    """
    run = _Run(model, prompt_ids, max_new_tokens, rngs, segment_ids, eos, first, last, sampling)
    text = [] if run.reads else [jnp.asarray(prompt_ids, jnp.int32)]
    text.append(run.rows.token[:, None])
    while left := max_new_tokens - run.made:
        text.append(run.advance(min(left, run.room())))
    return jnp.concatenate(text, axis=1)


def stream(model: Model, prompt_ids: Int[Array, "B P"], max_new_tokens: int = 64, *, rngs: nnx.Rngs | None = None,
           segment_ids: Int[Array, "B P"] | None = None, eos: int | Sequence[int] | None = None,
           first: int | None = None, last: int | None = None, **sampling) -> Iterator[np.ndarray]:
    """Yields the new tokens of `generate` as they come, int32 [B] each; ends early when every row has met `eos`.

    The next step is under way before a token is handed out: what the caller does with it costs the model no time.
    """
    run = _Run(model, prompt_ids, max_new_tokens, rngs, segment_ids, eos, first, last, sampling)
    ended = np.zeros(run.rows.token.shape, bool)
    for left in reversed(range(max_new_tokens)):
        now = run.rows.token
        if left:
            run.room()
            run.step()
        now = np.asarray(now)
        yield now
        ended |= np.isin(now, run.choice.eos)
        if ended.all():
            return


def grow(state, larger):
    """A state in the slots of one with a greater `max_length`: caches are extended at the end, the rest stays.

    Args: larger: `init_state` at the greater length; the shapes say which axes have grown. Slots are numbered by the
      order of writing, so this holds while no ring has come round, that is up to the `max_length` of `state`.
    """
    def place(small, large):
        return small if small.shape == large.shape else jax.lax.dynamic_update_slice(large, small, (0,) * large.ndim)

    leaves, structure = jax.tree.flatten(larger)  # which knows the new sizes
    return jax.tree.unflatten(structure, map(place, jax.tree.leaves(state), leaves))


class _Rows(NamedTuple):
    """Where the rows of a batch stand: the newest token of each [B], whether it has ended [B], and, for a repetition
    penalty alone, which tokens it has had [B, V]."""

    token: Int[Array, "B"]
    done: Bool[Array, "B"]
    seen: Bool[Array, "B V"] | None


class _Choice(NamedTuple):
    """What decides about tokens: a key; `Sampling.as_arrays`; the ids that end a row [E]; (index, token) pairs of what
    must be; how long all texts will be."""

    key: jax.Array
    sampling: Sampling
    eos: np.ndarray
    forced: list[tuple[np.int32, np.int32]]
    context_length: np.int32


class _Run:
    """A generation under way: `rows` hold the newest of the `made` tokens, the one before it is the last in `state`."""

    def __init__(self, model, prompt_ids, max_new_tokens, rngs, segment_ids, eos, first, last, sampling):
        vocab, sampling = model.config.vocab, Sampling(**sampling)
        ids, segments = _check_prompt(prompt_ids, segment_ids, vocab)
        if not (isinstance(max_new_tokens, int) and max_new_tokens >= 1):
            raise ValueError(f"max_new_tokens = {max_new_tokens!r}: must be a whole number of at least 1")
        sampling.check(vocab)
        ends, _, _ = (_check_tokens(name, value, vocab) for name, value in
                      [("eos", eos), ("first", first), ("last", last)])
        if not model.config.body.causal:
            raise ValueError("generate: the model sees both ways, so it has no next token to give")
        structure, parameters, rest = split(unstack(model))
        self.weights, self.programs, self.made = (parameters, rest), _programs(structure), 1
        self.reads = isinstance(model.config, EncoderDecoder)  # the prompt, as a source: what is written begins anew
        self.written = 1 if self.reads else ids.shape[1]
        self.limit = model.config.body.longest or NO_LIMIT
        reader = (model.config.encoder.longest or NO_LIMIT) if self.reads else self.limit
        if ids.shape[1] > reader or self.written + max_new_tokens > self.limit:
            places = f"{self.limit}, its encoder for {reader}" if self.reads else self.limit
            raise ValueError(f"a prompt of {ids.shape[1]} tokens and max_new_tokens = {max_new_tokens}: the model has "
                             f"places for {places}")
        length = min(_power_of_two(ids.shape[1], PROMPT), reader)
        slots = _power_of_two(max_new_tokens + 1, SLOTS) if self.reads else length
        self.slots = min(max(slots, SLOTS), self.limit)
        self.end = self.written + max_new_tokens
        padded = lambda a: np.pad(a, ((0, 0), (0, length - ids.shape[1])))
        must = {0: first, max_new_tokens - 1: last} if last is not None else {0: first}
        forced = [(np.int32(index), np.int32(token)) for index, token in must.items() if token is not None]
        self.choice = _Choice((nnx.Rngs(0) if rngs is None else rngs).sample(), sampling.as_arrays(), ends, forced,
                              np.int32(self.end))
        self.state, self.rows = self.programs["prefill"](self.weights, padded(ids), padded(segments), self.choice,
                                                         slots=self.slots)

    def room(self) -> int:
        """How many more tokens fit the caches, which are doubled where they are full."""
        if self.written == self.slots:
            self.slots = min(2 * self.slots, _quarter_step(self.end), self.limit)
            self.state = self.programs["grow"](self.weights, self.state, slots=self.slots)
        return self.slots - self.written

    def step(self):
        """One more token."""
        self.state, self.rows = self.programs["step"](
            self.weights, self.state, self.rows, np.int32(self.made), self.choice)
        self.made, self.written = self.made + 1, self.written + 1

    def advance(self, steps: int) -> Int[Array, "B N"]:
        """As many more tokens as `steps`, which must not exceed `room()`."""
        self.state, self.rows, text = self.programs["steps"](
            self.weights, self.state, self.rows, np.int32(self.made), self.choice, np.int32(steps), slots=self.slots)
        self.made, self.written = self.made + steps, self.written + steps
        return text[:, :steps]


@functools.lru_cache(maxsize=32)
def _programs(structure: nnx.GraphDef) -> dict:
    """The compiled functions of models of one structure. They close over it, since hashing it takes 0.3 ms a call."""

    def choose(logits, rows, index, choice):
        token = sample(logits, jax.random.fold_in(choice.key, index), choice.sampling, rows.seen)
        for when, forced in choice.forced:
            token = jnp.where(index == when, forced, token)
        token = jnp.where(rows.done, rows.token, token)
        done = rows.done | (token[:, None] == choice.eos).any(1)
        return _Rows(token, done, None if rows.seen is None else _note(rows.seen, token[:, None]))

    def step(weights, state, rows, index, choice):
        # a new token belongs to the document of the row's last one
        out = merge(structure, *weights)(rows.token[:, None], state, segment_ids=state.segment[:, None])
        return out.state, choose(out.logits[:, 0], rows, index, choice)

    def steps(weights, state, rows, index, choice, count, slots):
        def more(carry):
            i, _, rows, _ = carry
            return (i < count) & ~rows.done.all()

        def body(carry):
            i, state, rows, text = carry
            state, rows = step(weights, state, rows, index + i, choice)
            return i + 1, state, rows, jax.lax.dynamic_update_index_in_dim(text, rows.token, i, 1)

        text = jnp.zeros((rows.token.shape[0], slots), jnp.int32)
        made, state, rows, text = jax.lax.while_loop(more, body, (jnp.int32(0), state, rows, text))
        return state, rows, jnp.where(jnp.arange(slots) < made, text, rows.token[:, None])

    def prefill(weights, ids, segments, choice, slots):
        model, memory = merge(structure, *weights), None
        if isinstance(model.config, EncoderDecoder):
            memory, _ = model.encode(ids, segments)
            ids, segments = model.begin(ids.shape[0]), segments.max(1, keepdims=True)
        state = model.init_state(ids.shape[0], slots, context_length=choice.context_length, memory=memory)
        out = model(ids, state, segment_ids=segments, logits="last")
        seen = None
        if choice.sampling.repetition_penalty is not None:  # of each row's last document, whose length the state knows
            from_end = jnp.cumsum((segments > 0)[:, ::-1], 1)[:, ::-1]
            own = (segments > 0) & (from_end <= out.state.length[:, None])
            vocab = model.config.vocab
            seen = _note(jnp.zeros((ids.shape[0], vocab), bool), jnp.where(own, ids, vocab))
        none = jnp.zeros(ids.shape[:1], jnp.int32)
        return out.state, choose(out.logits[:, 0], _Rows(none, none > 0, seen), 0, choice)

    def larger(weights, state, slots):
        return grow(state, merge(structure, *weights).init_state(state.segment.shape[0], slots))

    return {"prefill": jax.jit(prefill, static_argnames="slots"),
            "step": jax.jit(step, donate_argnames="state"),
            "steps": jax.jit(steps, static_argnames="slots", donate_argnames="state"),
            "grow": jax.jit(larger, static_argnames="slots")}


def _note(seen: Bool[Array, "B V"], ids: Int[Array, "B T"]) -> Bool[Array, "B V"]:
    """`seen` with more ids; V stands for none."""
    return seen.at[jnp.arange(ids.shape[0])[:, None], ids].set(True, mode="drop")


def _check_prompt(prompt_ids, segment_ids, vocab: int):
    ids = np.asarray(prompt_ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or 0 in ids.shape:
        raise ValueError(f"prompt_ids of shape {ids.shape} and type {ids.dtype}: must be whole numbers [B, P], with at "
                         "least one row and one token")
    segments = np.ones_like(ids) if segment_ids is None else np.asarray(segment_ids)
    if segments.shape != ids.shape:
        raise ValueError(f"segment_ids of shape {segments.shape}: must have that of prompt_ids, {ids.shape}")
    if not (segments > 0).any(1).all():
        raise ValueError(f"segment_ids leave row {int((segments > 0).any(1).argmin())} without a token: a prompt must "
                         "have at least one")
    if ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(f"prompt_ids reach from {ids.min()} to {ids.max()}: must lie in [0, {vocab})")
    return ids.astype(np.int32), segments.astype(np.int32)


def _check_tokens(name: str, value: int | Sequence[int] | None, vocab: int) -> Int[np.ndarray, "E"]:
    ids = np.asarray([] if value is None else value).reshape(-1)
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab):
        raise ValueError(f"{name} = {value!r}: must be of the vocabulary, from 0 to {vocab - 1}")
    return ids.astype(np.int32)


def _quarter_step(n: int) -> int:
    """The least of 4, 5, 6, 7, 8, 10, 12, 14, 16, 20 ... that is at least `n`."""
    step = max(1, (1 << (n - 1).bit_length()) // 8)
    return -(-n // step) * step


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())
