"""The kernel of diagonal recurrences: a block of channels goes through time in registers."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from archlab.recurrence.kernels.sweep import on_gpu, on_tpu, sweep

LANES = 128  # channels of a TPU's register


def fits(dtype, platform: str | None = None) -> bool:
    """Real states of 32 bits on a TPU or GPU. Any length and any number of channels: they are filled up."""
    return dtype == jnp.float32 and (on_tpu(platform) or on_gpu(platform))


def diagonal_kernel(a, b, h, *, size: int = 256, platform: str | None = None, interpret: bool = False):
    """`sequential` of diagonal.py as a kernel, forward and backward.

    Args: a, b [B, T, F]; h [B, F]; size: steps to a block. platform: "tpu", "gpu", or None for the one in use.
    Returns: h [B, T, F] and the last [B, F].
    """
    length, channels = a.shape[1:]
    pad = [(0, 0), (0, -length % size), (0, -channels % LANES)]
    h = jnp.pad(h, [pad[0], pad[2]])[:, None]
    out, last = _scan(jnp.pad(a, pad, constant_values=1), jnp.pad(b, pad), h, (size, platform, interpret))
    return out[:, :length, :channels], last[:, 0, :channels]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scan(a, b, h, options):
    return _run(a, b, h, options, reverse=False)


def _forward(a, b, h, options):
    out, last = _scan(a, b, h, options)
    return (out, last), (a, h, out)


def _backward(options, kept, gradients):
    a, first, h = kept
    G, g = _run(a, *gradients, options, reverse=True)
    return G * jnp.concatenate([first, h[:, :-1]], 1), G, g


_scan.defvjp(_forward, _backward)


def _run(a, b, h, options, reverse):
    """h_t = a_t h_{t-1} + b_t; in reverse, G_t = b_t + g and g = a_t G_t: the gradient, of which g is carried."""
    size, platform, interpret = options
    rows, length, channels = a.shape
    a, b = (x.reshape(rows, length // size, size, channels) for x in (a, b))

    def body(c, carry, a, b, out):
        def step(t, h):
            at = pl.ds(size - 1 - t if reverse else t, 1)
            new = b[c, at] + (h if reverse else a[c, at] * h)
            out[c, at] = new
            return a[c, at] * new if reverse else new

        return [jax.lax.fori_loop(0, size, step, carry[0])]

    widths = (LANES,) if on_gpu(platform) else (4 * LANES, 2 * LANES, LANES)
    programs = channels // next(width for width in widths if channels % width == 0)
    (last,), (out,) = sweep(body, "B1F BCtF BCtF BCtF", [h], [a, b], [jax.ShapeDtypeStruct(b.shape, b.dtype)],
                            programs=programs, reverse=reverse, platform=platform, interpret=interpret)
    return out.reshape(rows, length, channels), last
