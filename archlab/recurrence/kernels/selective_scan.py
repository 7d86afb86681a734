"""The kernel of the selective scan: states [N, F] of a block of channels go through time in registers.

Its gradient keeps each chunk's first state, computes the others again, forward, and then goes backward through them, as
selective_scan.py does; the names are those of that file.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from archlab.recurrence.chunks import LEAST
from archlab.recurrence.kernels.sweep import on_gpu, on_tpu, sweep

LANES = 128  # channels of a TPU's register


def fits(h: jax.Array, platform: str | None = None) -> bool:
    """States [B, F, N] of 32 bits: on a TPU of at most 64 numbers a channel, on a GPU of 16, 32 or 64."""
    N = h.shape[-1]
    return h.dtype == jnp.float32 and (on_tpu(platform) and N <= 64 or on_gpu(platform) and N in (16, 32, 64))


def selective_scan_kernel(x, dt, A, B, C, starts, h, *, size: int = 16, platform: str | None = None,
                          interpret: bool = False):
    """`sequential` of selective_scan.py as a kernel, forward and backward.

    Args: as there; size: steps to a chunk, whose states are computed again in the backward pass. platform: "tpu",
      "gpu", or None for the one in use.
    """
    length, channels = x.shape[1:]
    size = min(size, 1 << (length - 1).bit_length())
    wide, time = [(0, -channels % LANES)], [(0, -length % size)]
    step = lambda a: jnp.pad(a, [(0, 0), *time, *wide]).reshape(len(a), -1, size, channels + wide[0][1])
    thin = lambda a: jnp.swapaxes(jnp.pad(a, [(0, 0), *time, (0, 0)]).reshape(len(a), -1, size, a.shape[-1]), 2, 3)
    forget = thin(jnp.where(starts, LEAST, 0).astype(h.dtype)[:, :, None])
    h = jnp.pad(jnp.swapaxes(h, 1, 2), [(0, 0), (0, 0), *wide])
    y, h = _scan((size, platform, interpret), h, jnp.pad(A.T, [(0, 0), *wide]), step(dt), step(dt * x), thin(B),
                 thin(C), forget)
    y = y.reshape(len(y), -1, y.shape[-1])[:, :length, :channels]
    return y, jnp.swapaxes(h[:, :, :channels], 1, 2)


# From here on time is in chunks of t steps: dt and u = dt * x are [B, C, t, F], the maps B and C [B, C, N, t], `forget`
# [B, C, 1, t]; A is [N, F] and a state [B, N, F].


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, h, A, dt, u, B, C, forget):
    return _sweep(options, h, A, dt, u, B, C, forget, keep=False)[:2]


def _forward(options, h, *arrays):
    y, last, firsts = _sweep(options, h, *arrays, keep=True)
    return (y, last), (firsts, arrays)


def _sweep(options, h, A, dt, u, B, C, forget, keep):
    size, platform, interpret = options
    rows, chunks = dt.shape[:2]

    def body(c, carry, A, dt, u, B, C, forget, y, *first):
        A, B, C, forget = A[...], B[c], C[c], forget[c]
        if keep:
            first[0][c] = carry[0]

        def step(t, h):
            at = pl.ds(t, 1)
            h = jnp.exp(dt[c, at] * A + _pick(forget, t)) * h + _pick(B, t) * u[c, at]
            y[c, at] = (_pick(C, t) * h).sum(0, keepdims=True)
            return h

        return [jax.lax.fori_loop(0, size, step, carry[0])]

    outs = [jax.ShapeDtypeStruct(dt.shape, h.dtype), jax.ShapeDtypeStruct((rows, chunks, *h.shape[1:]), h.dtype)]
    letters = "BnF nF BCtF BCtF BCnt BCnt BCnt BCtF" + " BCnF" * keep
    (last,), outs = sweep(body, letters, [h], [A, dt, u, B, C, forget], outs[:1 + keep],
                          programs=_blocks(h.shape[-1], platform), platform=platform, interpret=interpret)
    return outs[0], last, *outs[1:]


def _backward(options, kept, gradients):
    size, platform, interpret = options
    firsts, (A, dt, u, B, C, forget) = kept
    dy, g = gradients
    rows, chunks, N, F = firsts.shape
    programs = _blocks(F, platform)

    def body(c, carry, A, first, dt, u, B, C, forget, dy, ddt, du, dB, dC, states):
        A, B, C, forget = A[...], B[c], C[c], forget[c]
        decay = lambda t: jnp.exp(dt[c, pl.ds(t, 1)] * A + _pick(forget, t))

        def again(t, now):
            h, dC = now
            states[t] = h
            h = decay(t) * h + _pick(B, t) * u[c, pl.ds(t, 1)]
            return h, _put(dC, t, (h * dy[c, pl.ds(t, 1)]).sum(1, keepdims=True))

        def back(i, now):
            t = size - 1 - i
            at = pl.ds(t, 1)
            g, dA, dB = now
            G = g + _pick(C, t) * dy[c, at]
            g = decay(t) * G
            rate = g * states[t]
            ddt[c, at] = (A * rate).sum(0, keepdims=True)
            du[c, at] = (_pick(B, t) * G).sum(0, keepdims=True)
            return g, dA + dt[c, at] * rate, _put(dB, t, (G * u[c, at]).sum(1, keepdims=True))

        wait()
        _, dC[c] = jax.lax.fori_loop(0, size, again, (first[c], jnp.zeros_like(C)))
        wait()
        g, dA, dB[c] = jax.lax.fori_loop(0, size, back, (*carry, jnp.zeros_like(B)))
        return [g, dA]

    # On a GPU `states` lie in its memory, and one thread may read what another has written.
    wait = triton.debug_barrier if on_gpu(platform) and not interpret else lambda: None

    steps, maps = dt.shape, (rows, programs, *B.shape[1:])
    shapes = [steps, steps, maps, maps, (rows, size, N, F)]  # the last: the states of the chunk at hand
    (g, dA), (ddt, du, dB, dC, _) = sweep(
        body, "BnF BnF nF BCnF BCtF BCtF BCnt BCnt BCnt BCtF BCtF BCtF BHCnt BHCnt BtnF", [g, jnp.zeros_like(g)],
        [A, firsts, dt, u, B, C, forget, dy], [jax.ShapeDtypeStruct(shape, g.dtype) for shape in shapes],
        programs=programs, reverse=True, platform=platform, interpret=interpret)
    return g, dA.sum(0), ddt, du, dB.sum(1), dC.sum(1), jnp.zeros_like(forget)


_scan.defvjp(_forward, _backward)


def _blocks(channels: int, platform) -> int:
    """How many programs share the channels. States of 64 x 128 or 16 x 512 fill half of a TPU core's registers."""
    widths = (LANES,) if on_gpu(platform) else (2 * LANES, LANES)
    return channels // next(width for width in widths if channels % width == 0)


def _pick(columns, t):
    """Column t of [n, t], as [n, 1]. Neither Mosaic nor Triton indexes the last axis of a value."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1) == t, columns, 0).sum(1, keepdims=True)


def _put(columns, t, column):
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1) == t, column, columns)
