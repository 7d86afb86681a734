"""The one contract that every part of a network keeps:

    y, state, aux = layer(x, tokens, state=None)

`x` and `y` are floats [B, T, D]; `tokens` says what is known about the tokens; `state` lives outside the module and
is None for a pass without memory; `aux` carries losses, traces and updates. There is one verb: T == 1 with a state is
a decode step, a longer T continues from the state. docs/contract.md states the laws that every layer is tested for.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def pytree(cls):
    """Class decorator: a frozen dataclass whose fields are pytree children, but where metadata says static."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class Training:
    """Asks a layer for its training form (dropout, jitter, capacity with dropping, look-ahead routing).

    key: a typed PRNG key; combinators fold their child's index into it. step: the training step, int32 scalar.
    """

    key: jax.Array
    step: jax.Array


@pytree
class Memory:
    """What cross-attending layers read: values [B, S, D]; segments [B, S]: the document of each, 0 for padding. A token
    reads what bears the number of its own document."""

    values: Float[Array, "B S D"]
    segments: Int[Array, "B S"]


@pytree
class Tokens:
    """What is known about the tokens of a batch.

    segments [B, T] int32: 0 is padding, each other number a document; a change of number starts a new document, and a
      number is not used twice in a row of the batch (nor within the life of one state). In every row padding comes
      last: the model moves it there at its door and back at its exit, so that layers may rely on it.
    positions [B, T] int32: places within the document, counted from 0.
    training: None, or the wish for the training form.
    provided: values that earlier layers published by name for later ones (`Provide`).
    context_length: how long the whole text is declared to be, int32 scalar: T without a state, the state's `max_length`
      with one. None where nobody said. Only positions that depend on it read it (dynamic NTK, LongRoPE).
    memory: what cross-attending layers read in a pass without a state; with one, it is in the state.
    keys: what attention does with keys and values, for layers that run it again over the same text. None: as always.
      "keep": in a pass without a state, they are handed out as the new state. "read": those of the state are attended
      to, and none are written (recursive sharing).
    last_only: nobody will look at the output of any token but each row's last real one. A combinator hands it on to
      its last layer alone; who saves nothing by it may ignore it.
    """

    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    training: Training | None = None
    provided: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    context_length: Int[Array, ""] | None = None
    memory: Memory | None = None
    keys: str | None = dataclasses.field(default=None, metadata={"static": True})
    last_only: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def real(self) -> Bool[Array, "B T"]:
        """Where there is a token and not padding."""
        return self.segments > 0

    def fold(self, index) -> "Tokens":
        """These tokens with `index` (int, may be traced) folded into the training key: each child draws its own."""
        if self.training is None:
            return self
        key = jax.random.fold_in(self.training.key, index)
        return dataclasses.replace(self, training=dataclasses.replace(self.training, key=key))

    def provide(self, values: dict[str, jax.Array]) -> "Tokens":
        """These tokens with more values published."""
        return dataclasses.replace(self, provided={**self.provided, **values}) if values else self


@pytree
class Policy:
    """A decision that was drawn for each token, to be trained by REINFORCE (`training/reinforce.py`).

    log_prob [B, T]: the log-probability of what was drawn, differentiable. cost [B, T]: what it spent, in nats.
    weight: how strongly it is trained. discount: how much of each later token's loss counts. Over n copies all have
    an axis [n] in front.
    """

    log_prob: Float[Array, "B T"]
    cost: Float[Array, "B T"]
    weight: Float[Array, ""]
    discount: Float[Array, ""]

    def take(self, index: Int[Array, "B S"], where: Bool[Array, "B S"]) -> "Policy":
        """The policy of a row's tokens in the order of `index`; nothing was drawn or spent outside `where`."""
        def pick(a):
            places = jnp.broadcast_to(jnp.minimum(index, a.shape[-1] - 1), (*a.shape[:-1], index.shape[-1]))
            return jnp.where(where, jnp.take_along_axis(a, places, -1), 0)

        return dataclasses.replace(self, log_prob=pick(self.log_prob), cost=pick(self.cost))


@pytree
class Aux:
    """What a layer says besides its output; keys are paths of module attributes, joined by "/".

    losses: scalars to be added to the loss, their coefficients applied ([n] over n copies).
    traces: arrays to look at (expert load, routed depth, step size); those of [B, T] are of tokens as layers see them,
      padding last.
    updates: changes to the module's own variables that no gradient makes; the key names the variable.
    provides: values for later layers, by name; the enclosing `Sequence` or `Recur` hands them on and drops them.
    policies: decisions that were drawn, in the training form.
    """

    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    traces: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    updates: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    provides: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    policies: dict[str, Policy] = dataclasses.field(default_factory=dict)

    def under(self, name: str) -> "Aux":
        """The same with `name/` put before every key (published names are flat)."""
        put = lambda d: {f"{name}/{key}": value for key, value in d.items()}
        return Aux(put(self.losses), put(self.traces), put(self.updates), self.provides, put(self.policies))

    def within(self) -> "Aux":
        """The same without published values: what a layer that has handed them on says itself."""
        return dataclasses.replace(self, provides={})

    def __or__(self, other: "Aux") -> "Aux":
        return Aux(self.losses | other.losses, self.traces | other.traces, self.updates | other.updates,
                   self.provides | other.provides, self.policies | other.policies)

    def loss(self) -> jax.Array:
        """The sum of all losses, float32 scalar."""
        return sum((jnp.sum(value) for value in self.losses.values()), jnp.float32(0))


class Place(NamedTuple):
    """Where in the network a layer is built, for its sizes and for initialisers that depend on depth.

    width: D. index: the number of the residual branch, from 0 (may be traced under `Repeat`). depth: how many residual
    branches the whole network runs through. spread: among how many of them initialisers divide what is added to the
    stream; None for all.
    """

    width: int
    index: Any = 0
    depth: int = 1
    spread: int | None = None

    @property
    def sharers(self) -> int:
        """Among how many branches initialisers divide what is added to the stream: `spread`, or all."""
        return max(self.depth if self.spread is None else self.spread, 1)


class Layer(nnx.Module):
    """Base of all layers. A subclass defines `__call__`, and `init_state` where it remembers something."""

    def init_state(self, batch: int, max_length: int, dtype=jnp.float32, memory: Memory | None = None) -> Any:
        """The state before the first token: a pytree of fixed shapes and dtypes, or None for a layer without memory.

        Args:
          batch: B. max_length: the most tokens a row will hold. dtype: of caches (recurrent state is at least float32).
          memory: what cross-attending layers read; projected once, here, into the state.
        """
        return None

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens, state: Any = None):
        raise TypeError(f"{type(self).__name__} does not define __call__")


def wide(x: jax.Array) -> jax.Array:
    """`x` in float32, or as it is if that is wider: for sums, norms, softmaxes and recurrences."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def document_starts(segments: Int[Array, "B T"], last: Int[Array, "B"]):
    """Where documents begin, and the last one met.

    Args: segments, as in `Tokens`; last [B]: the segment of the last real token before this piece, 0 for none.
    Returns: starts [B, T] bool, true at the first token of each document (never at padding); last [B] int32 after it.
    """
    time = jnp.arange(segments.shape[1])
    seen = jax.lax.cummax(jnp.where(segments > 0, time, -1), axis=1)  # index of the last real token so far
    before = jnp.pad(seen, ((0, 0), (1, 0)), constant_values=-1)
    named = lambda index: jnp.where(index < 0, last[:, None], jnp.take_along_axis(segments, jnp.maximum(index, 0), 1))
    return (segments > 0) & (segments != named(before[:, :-1])), named(before[:, -1:])[:, 0]


def count_positions(segments: Int[Array, "B T"], last: Int[Array, "B"], length: Int[Array, "B"]):
    """Places within documents, continued from an earlier piece; padding is not counted.

    Args: last, length [B]: the segment of the last real token so far, and how many tokens its document has had.
    Returns: positions [B, T] int32 (0 at padding before any token), last [B], length [B] after this piece.
    """
    starts, new_last = document_starts(segments, last)
    count = jnp.cumsum(segments > 0, axis=1) - 1 + length[:, None]
    origin = jax.lax.cummax(jnp.where(starts, count, 0), axis=1)
    positions = jnp.maximum(count - origin, 0).astype(jnp.int32)
    return positions, new_last, (count - origin)[:, -1].astype(jnp.int32) + 1
