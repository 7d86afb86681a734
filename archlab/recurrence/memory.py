"""What all matrix-state recurrences share: the state, and the door through which their forms are called.

Such a recurrence keeps a matrix S [N, P] for every head: it writes the value v [P] at the key k [N], forgets by its own
rule, and reads y = q S. The rules are in scalar_decay, channel_decay, delta_rule and generalised_delta.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from archlab.layers.contract import Tokens, document_starts, pytree
from archlab.layers.sharding import free_axes, per_shard
from archlab.recurrence.shapes import check_shapes

# HIGHEST, because the dots of GPUs and TPUs would round the state.
dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@pytree
class MemoryState:
    """matrix [B, H, N, P]: S of each row's last document, at least float32. segment [B]: that document."""

    matrix: Float[Array, "B H N P"]
    segment: Int[Array, "B"]

    @classmethod
    def zeros(cls, batch: int, heads: int, keys: int, values: int, dtype) -> "MemoryState":
        dtype = jnp.promote_types(dtype, jnp.float32)
        return cls(jnp.zeros((batch, heads, keys, values), dtype), jnp.zeros((batch,), jnp.int32))


def remember(choose: Callable, letters: str, tokens: Tokens, state: MemoryState, **arrays: jax.Array):
    """The door that every recurrence of matrix states goes through: `choose(S, length)` is what computes it over a
    piece, `run(q, k, v, *others, starts, S) -> (y, S)`.

    What `run` gets fits together and is in the dtype of the state; it is told where documents start; keys and `others`
    are 0 at padding, which must leave the state as it is; and it works on every device's own rows and heads.

    Args: letters: a word for each of `arrays`, which are q, k and v, then `others`. q and k are of all heads (H), or of
      groups of them (G): head h reads and writes with the queries and keys of group h // (H / G).
    Returns: y [B, H, T, P], and the state after the piece. ValueError for arguments that do not fit together.
    """
    check_shapes(f"BT BHNP {letters}", tokens=tokens.segments, state=getattr(state, "matrix", state), **arrays)
    q, k, v, *others = arrays.values()
    G, H = q.shape[1], v.shape[1]
    if H % G:
        raise ValueError(f"{H} heads do not divide into {G} groups of queries and keys")
    run = choose(state.matrix, v.shape[2])
    starts, last = document_starts(tokens.segments, state.segment)
    hide = lambda a: jnp.where(tokens.real.reshape(tokens.real.shape[0], 1, -1, *[1] * (a.ndim - 3)), a, 0)
    k, *others = map(hide, (k, *others))
    if 1 < G < H and G % free_axes(jax.sharding.get_abstract_mesh()).get("tensor", 1):
        q, k = (jnp.repeat(a, H // G, axis=1) for a in (q, k))  # groups that do not divide over devices
    if q.shape[1] == H:
        letters = letters.replace("G", "H")
    arrays = [a.astype(state.matrix.dtype) for a in (q, k, v, *others)]
    y, matrix = per_shard(run, f"{letters} BT BHNP", "BHTP BHNP")(*arrays, starts, state.matrix)
    return y, MemoryState(matrix, last)


def step_by_step(step: Callable, starts: Bool[Array, "B T"], S: Float[Array, "B H N P"], *steps: jax.Array):
    """The definition, as a scan: `step(S, *now) -> (S, y)` over arrays [B, H, T, ...]; S is zeroed where starts."""
    def run(S, now):
        start, *now = now
        return step(jnp.where(start[:, None, None, None], 0, S), *now)

    if starts.shape[1] == 1:
        S, y = run(S, [starts[:, 0], *(a[:, :, 0] for a in steps)])
        return y[:, :, None], S
    S, y = jax.lax.scan(run, S, [starts.T, *(jnp.moveaxis(a, 2, 0) for a in steps)])
    return jnp.moveaxis(y, 0, 2), S


def per_head(a: Float[Array, "B G T N"], heads: int) -> Float[Array, "B H T N"]:
    """Queries or keys of groups, repeated for each head of the group."""
    return jnp.repeat(a, heads // a.shape[1], axis=1)
