"""Text from a model: a prefill of the whole prompt, then one token after another.

Nothing is compiled twice. Prompts are padded to powers of two; caches have powers of two of slots and double when they
are full; each size is one program that runs any number of steps. So the number of programs grows with the logarithm of
the length, and a decode step reads at most about twice the cache that it needs.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from archlab.encoder_decoder import EncoderDecoder
from archlab.inference.sampling import check_sampling, sample
from archlab.layers.repeat import unstack
from archlab.layers.weights import merge, split
from archlab.model import Model

NO_LIMIT = 2**30  # tokens
PROMPT, SLOTS = 16, 256  # the shortest prompt and the smallest cache that a program is compiled for


def generate(model: Model, prompt_ids: Int[Array, "B P"], max_new_tokens: int = 64, temperature: float = 0.8,
             top_k: int | None = None, top_p: float | None = None, rngs: nnx.Rngs | None = None,
             segment_ids: Int[Array, "B P"] | None = None, eos: int | None = None) -> Int[Array, "B P+N"]:
    """Continues each prompt by `max_new_tokens` (N) tokens; an encoder-decoder reads it, and writes a text of its own.

    Args:
      model: copies of a `Repeat` are taken apart here; pass `unstack(model)` to have that done once for many calls.
      prompt_ids: token ids; rows of unequal length are padded, left or right, where `segment_ids` is 0.
      temperature, top_k, top_p: as in `sample`; temperature 0 is greedy.
      rngs: where chance comes from; None for `nnx.Rngs(0)`.
      segment_ids: as for the model, 0 for padding; what is new belongs to each row's last document.
      eos: the token that ends a row: it is repeated to the row's end, and the work stops when all rows have ended.

    Returns: the prompts as given, padding too, and after them what is new; of an encoder-decoder what is new [B, N].
    Raises: ValueError for an empty prompt, ids outside the vocabulary, and settings out of their range.
    """
    run = _Run(model, prompt_ids, max_new_tokens, temperature, top_k, top_p, rngs, segment_ids, eos)
    text = [] if run.reads else [jnp.asarray(prompt_ids, jnp.int32)]
    text.append(run.token[:, None])
    while left := max_new_tokens - run.made:
        text.append(run.advance(min(left, run.room())))
    return jnp.concatenate(text, axis=1)


def stream(model: Model, prompt_ids: Int[Array, "B P"], max_new_tokens: int = 64, temperature: float = 0.8,
           top_k: int | None = None, top_p: float | None = None, rngs: nnx.Rngs | None = None,
           segment_ids: Int[Array, "B P"] | None = None, eos: int | None = None) -> Iterator[np.ndarray]:
    """Yields the new tokens of `generate` as they come, int32 [B] each; ends early when every row has met `eos`.

    The next step is under way before a token is handed out: what the caller does with it costs the model no time.
    """
    run = _Run(model, prompt_ids, max_new_tokens, temperature, top_k, top_p, rngs, segment_ids, eos)
    ended = np.zeros(run.token.shape, bool)
    for left in reversed(range(max_new_tokens)):
        now = run.token
        if left:
            run.room()
            run.step()
        now = np.asarray(now)
        yield now
        ended |= now == run.eos
        if ended.all():
            return


def grow(state, larger):
    """A state in the slots of one with a greater `max_length`: caches are extended at the end, the rest stays.

    Args: larger: `init_state` at the greater length; the shapes say which axes have grown. Slots are numbered by the
      order of writing, so this holds while no ring has come round, that is up to the `max_length` of `state`.
    """
    def place(small, large):
        return small if small.shape == large.shape else jax.lax.dynamic_update_slice(large, small, (0,) * large.ndim)

    return jax.tree.map(place, state, larger)


class _Run:
    """A generation under way: `token` [B] is the newest of the `made` tokens, the one before it the last in `state`."""

    def __init__(self, model, prompt_ids, max_new_tokens, temperature, top_k, top_p, rngs, segment_ids, eos):
        ids, segments = _check_prompt(prompt_ids, segment_ids, model.config.vocab)
        if not (isinstance(max_new_tokens, int) and max_new_tokens >= 1):
            raise ValueError(f"max_new_tokens = {max_new_tokens!r}: must be a whole number of at least 1")
        check_sampling(model.config.vocab, temperature, top_k, top_p)
        if eos is not None and not 0 <= eos < model.config.vocab:
            raise ValueError(f"eos = {eos!r}: must be an id of the vocabulary, from 0 to {model.config.vocab - 1}")
        if not model.config.body.causal:
            raise ValueError("generate: the model sees both ways, so it has no next token to give")
        structure, parameters, rest = split(unstack(model))
        self.weights, self.programs = (parameters, rest), _programs(structure)
        self.top_k, self.eos, self.made = top_k, -1 if eos is None else eos, 1
        self.choice = {"key": (nnx.Rngs(0) if rngs is None else rngs).sample(), "eos": np.int32(self.eos),
                       "temperature": np.float32(temperature) if temperature else None,
                       "top_p": None if top_p is None else np.float32(top_p)}
        self.reads = isinstance(model.config, EncoderDecoder)  # the prompt, as a source: what is written begins anew
        self.written = 1 if self.reads else ids.shape[1]
        self.limit = model.config.body.longest or NO_LIMIT
        reader = (model.config.encoder.longest or NO_LIMIT) if self.reads else self.limit
        if ids.shape[1] > reader or self.written + max_new_tokens > self.limit:
            raise ValueError(f"a prompt of {ids.shape[1]} tokens and max_new_tokens = {max_new_tokens}: the model has places "
                             f"for {self.limit}" + (f", its encoder for {reader}" if self.reads else ""))
        length = min(_power_of_two(ids.shape[1], PROMPT), reader)
        slots = _power_of_two(max_new_tokens + 1, SLOTS) if self.reads else length
        self.slots = min(max(slots, SLOTS), self.limit)
        padded = lambda a: np.pad(a, ((0, 0), (0, length - ids.shape[1])))
        self.choice["context_length"] = np.int32(self.written + max_new_tokens)
        self.state, self.token, self.done = self.programs["prefill"](
            self.weights, padded(ids), padded(segments), self.choice, top_k=top_k, slots=self.slots)

    def room(self) -> int:
        """How many more tokens fit the caches, which are doubled where they are full."""
        if self.written == self.slots:
            self.slots = min(2 * self.slots, self.limit)
            self.state = self.programs["grow"](self.weights, self.state, slots=self.slots)
        return self.slots - self.written

    def step(self):
        """One more token."""
        self.state, self.token, self.done = self.programs["step"](
            self.weights, self.state, self.token, self.done, np.int32(self.made), self.choice, top_k=self.top_k)
        self.made, self.written = self.made + 1, self.written + 1

    def advance(self, steps: int) -> Int[Array, "B N"]:
        """As many more tokens as `steps`, which must not exceed `room()`."""
        self.state, self.token, self.done, text = self.programs["steps"](
            self.weights, self.state, self.token, self.done, np.int32(self.made), self.choice, np.int32(steps),
            top_k=self.top_k, slots=self.slots)
        self.made, self.written = self.made + steps, self.written + steps
        return text[:, :steps]


@functools.lru_cache(maxsize=32)
def _programs(structure: nnx.GraphDef) -> dict:
    """The compiled functions of models of one structure. They close over it, since hashing it takes 0.3 ms a call."""

    def choose(logits, done, index, choice, top_k):
        key = jax.random.fold_in(choice["key"], index)
        token = jnp.where(done, choice["eos"], sample(logits, key, choice["temperature"], top_k, choice["top_p"]))
        return token, token == choice["eos"]

    def step(weights, state, token, done, index, choice, top_k):
        # a new token belongs to the document of the row's last one
        out = merge(structure, *weights)(token[:, None], state, segment_ids=state.segment[:, None])
        return out.state, *choose(out.logits[:, 0], done, index, choice, top_k)

    def steps(weights, state, token, done, index, choice, count, top_k, slots):
        def more(carry):
            i, _, _, done, _ = carry
            return (i < count) & ~done.all()

        def body(carry):
            i, state, token, done, text = carry
            state, token, done = step(weights, state, token, done, index + i, choice, top_k)
            return i + 1, state, token, done, jax.lax.dynamic_update_index_in_dim(text, token, i, 1)

        text = jnp.full((token.shape[0], slots), choice["eos"])
        return jax.lax.while_loop(more, body, (jnp.int32(0), state, token, done, text))[1:]

    def prefill(weights, ids, segments, choice, top_k, slots):
        model, memory = merge(structure, *weights), None
        if isinstance(model.config, EncoderDecoder):
            memory, _ = model.encode(ids, segments)
            ids, segments = model.begin(ids.shape[0]), segments.max(1, keepdims=True)
        state = model.init_state(ids.shape[0], slots, context_length=choice["context_length"], memory=memory)
        out = model(ids, state, segment_ids=segments, logits="last")
        return out.state, *choose(out.logits[:, 0], jnp.zeros(ids.shape[:1], bool), 0, choice, top_k)

    def larger(weights, state, slots):
        return grow(state, merge(structure, *weights).init_state(state.segment.shape[0], slots))

    return {"prefill": jax.jit(prefill, static_argnames=("top_k", "slots")),
            "step": jax.jit(step, static_argnames="top_k", donate_argnames="state"),
            "steps": jax.jit(steps, static_argnames=("top_k", "slots"), donate_argnames="state"),
            "grow": jax.jit(larger, static_argnames="slots")}


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


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())
