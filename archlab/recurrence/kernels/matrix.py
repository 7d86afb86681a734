"""Kernels of matrix states: a chunk's rule, and its gradient, run on the chip.

A rule is a function of values on the chip, `rule(S, *blocks) -> (S, y)`: products of matrices in place of a chunk's
steps. The forward kernel takes it from chunk to chunk and keeps each chunk's first state. The backward kernel runs its
transpose (`jax.vjp` of the rule, traced inside the kernel) from the last chunk to the first, computing again what lies
within a chunk. So the gradient keeps one state a chunk, and each rule is written once.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from archlab.recurrence.chunks import LEAST
from archlab.recurrence.forms import Kernel
from archlab.recurrence.kernels.sweep import on_gpu, on_tpu, sweep

TILE = 32  # columns of a state that a GPU's program takes


def fitting(S: jax.Array, length: int, platform: str | None = None, most: int = 256) -> Kernel | None:
    """The form to take for states S [B, H, N, P] and a piece of some length; None where kernels do not fit.

    They fit states of 32 bits and at least one whole chunk: on a TPU with at most `most` keys and values, since what
    a rule and its gradient need must fit a core's memory; on a GPU with 16, 32 or 64 keys, and values in powers of 2,
    since Triton knows no other sizes, in chunks of 16 steps, since a multiprocessor's registers hold no more.
    """
    N, P = S.shape[-2:]
    if on_tpu(platform) and max(N, P) <= most:
        form = Kernel(64)
    elif on_gpu(platform) and N in (16, 32, 64) and P >= 16 and P & (P - 1) == 0:
        form = Kernel(16)
    else:
        return None
    return form if S.dtype == jnp.float32 and length >= form.size else None


def forgetting(g, starts):
    """Log-decays g [B, H, T, ...] under which a state is forgotten where a document starts."""
    starts = starts.reshape(len(starts), 1, -1, *[1] * (g.ndim - 3))
    return jnp.maximum(jnp.where(starts, LEAST, g), LEAST)


def through_chunks(rule: Callable, arrays: list[jax.Array], S: jax.Array, size: int, platform: str | None = None,
                   interpret: bool = False):
    """`rule` over a piece.

    Args: arrays: q, k and v, then others, [B, H, T, ...] or of G groups of the heads; with no further axis, blocks come
      as rows [1, size], else as [size, N]; where they are zero the rule must leave the state as it is. S [B, H, N, P].
      size: steps to a chunk, a power of 2. platform: "tpu", "gpu", or None for the one in use.
    Returns: y [B, H, T, P] and the last S.
    """
    length, (B, H, _, P) = arrays[0].shape[2], S.shape
    size = min(size, 1 << (length - 1).bit_length())
    # Columns of a state have nothing to do with each other: a GPU takes 32 at a time, as if they were heads.
    tiles = P // TILE if on_gpu(platform) and P % TILE == 0 else 1
    apart = lambda a: jnp.moveaxis(a.reshape(B, H, -1, tiles, P // tiles), 3, 2).reshape(B, H * tiles, -1, P // tiles)
    joined = lambda a: jnp.moveaxis(a.reshape(B, H, tiles, -1, P // tiles), 2, 3).reshape(B, H, -1, P)

    def cut(a):
        a = jnp.pad(a, [(0, 0), (0, 0), (0, -length % size)] + [(0, 0)] * (a.ndim - 3))
        row = (1, size) if a.ndim == 3 else (size,)
        return a.reshape(*a.shape[:2], -1, *row, *a.shape[3:])

    q, k, v, *rest = arrays
    y, S = _run(rule, (platform, interpret), apart(S), *map(cut, (q, k, apart(v), *rest)))
    return joined(y)[:, :, :length], joined(S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(rule, where, S, *arrays):
    return _sweep(rule, where, S, arrays, keep=False)[:2]


def _forward(rule, where, S, *arrays):
    y, last, firsts = _sweep(rule, where, S, arrays, keep=True)
    return (y, last), (firsts, arrays)


def _sweep(rule, where, S, arrays, keep):
    """y and the last state; and, where they are kept, the states before each chunk."""
    batch, heads, N, P = S.shape
    chunks, size = arrays[0].shape[2:4]

    def body(c, carry, *refs):
        (S,), blocks, outs = carry, refs[:len(arrays)], refs[len(arrays):]
        if keep:
            outs[1][c] = S
        S, outs[0][c] = rule(S, *(ref[c] for ref in blocks))
        return [S]

    shapes = [(size, P), (N, P)] if keep else [(size, P)]
    outs = [jax.ShapeDtypeStruct((batch, heads, chunks, *shape), S.dtype) for shape in shapes]
    letters = " ".join(["BHnp", *["BHCtn"] * (len(arrays) + len(outs))])
    (last,), outs = sweep(body, letters, [S], list(arrays), outs, programs=heads, platform=where[0], interpret=where[1])
    return outs[0], last, *outs[1:]


def _backward(rule, where, kept, gradients):
    firsts, arrays = kept
    dy, dS = gradients
    heads = dS.shape[1]

    def body(c, carry, dy, first, *refs):
        blocks, outs = refs[:len(arrays)], refs[len(arrays):]
        _, pull = jax.vjp(rule, first[c], *(ref[c] for ref in blocks))
        dS, *grads = pull((carry[0], dy[c]))
        for out, grad in zip(outs, grads):
            out[c] = grad
        return [dS]

    outs = [jax.ShapeDtypeStruct((a.shape[0], heads, *a.shape[2:]), a.dtype) for a in arrays]
    letters = " ".join(["BHnp", *["BHCtn"] * (2 + 2 * len(arrays))])
    (dS,), grads = sweep(body, letters, [dS], [dy, firsts, *arrays], outs, programs=heads, reverse=True,
                         platform=where[0], interpret=where[1])
    group = lambda g, a: g.reshape(*a.shape[:2], -1, *a.shape[2:]).sum(2)  # over the heads that share a block
    return dS, *map(group, grads, arrays)


_run.defvjp(_forward, _backward)


# What rules are made of. Products on the chip: [t, n] arrays of a chunk, no others, as Triton wants.


def dot(a, b, contract: str = "nn"):
    """a b ("nn"), a b^T ("nt") or a^T b ("tn"), in the precision that `sweep` sets."""
    axes = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[contract]
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def places(size: int):
    """Two [size, size] arrays of int32: the number of the row, and that of the column."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


def column(row):
    """[1, n] to [n, 1], without the transpose of a thin array."""
    i, j = places(row.shape[1])
    return jnp.where(i == j, row, 0).sum(1, keepdims=True)


def decays(g):
    """From log-decays [1, t] of a chunk's steps, four decays. Each is the exponential of a sum of the steps that lie
    between, never of a difference of sums: so none is above 1, and no digits are lost where decays are strong.

    Returns: from the beginning through each step [t, 1]; from step s (exclusive) through step t [t, s], 0 where s > t;
      from each step (exclusive) through the end [t, 1]; of the whole chunk [1, 1].
    """
    t, s = places(g.shape[1])
    after = jnp.where(s > t, g, 0)  # [s, r]: the log-decays of steps r after s
    through = jnp.where(s <= t, g, 0).sum(1, keepdims=True)
    between = dot(jnp.where(s <= t, 1, 0).astype(g.dtype), after, "nt")  # sum over r <= t
    whole = jnp.exp(g.sum(1, keepdims=True))
    return jnp.exp(through), jnp.where(s <= t, jnp.exp(between), 0), jnp.exp(after.sum(1, keepdims=True)), whole


@jax.custom_jvp
def inverse(A):
    """(1 + A)^-1 of a strictly lower triangular A: the inverses of blocks on the diagonal, each twice as large as those
    before. Unlike a product of powers of A it stays exact where the keys of a chunk are alike."""
    i, j = places(A.shape[0])
    X = jnp.where(i == j, 1, 0).astype(A.dtype)
    for level in range((A.shape[0] - 1).bit_length()):
        below = ((i >> level) == (j >> level) + 1) & (((i >> level) & 1) == 1)
        X = X - dot(dot(X, jnp.where(below, A, 0)), X)
    return X


@inverse.defjvp
def _inverse_jvp(primals, tangents):
    X = inverse(*primals)
    return X, -dot(dot(X, tangents[0]), X)
