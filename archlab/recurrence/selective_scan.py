"""The selective scan: a diagonal recurrence whose decay and input depend on the token.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t

Gu & Dao 2023, Mamba (arXiv:2312.00752), section 3.2 and algorithm 2.

Every channel of every state decays at its own rate, so no product of matrices does this work, and time runs step by
step on every kind of device. The gradient is written by hand: each chunk's first state is kept, the other states are
computed again, and all gradients come out of one loop that runs backward.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from archlab.recurrence.diagonal import choose, in_place
from archlab.recurrence.forms import Associative, Chunked, Form, Kernel, Sequential, check_form
from archlab.recurrence.kernels.selective_scan import fits, selective_scan_kernel
from archlab.recurrence.memory import dot
from archlab.recurrence.shapes import check_shapes

CHUNK = 16  # steps between the states that are kept for the backward pass: a chunk of states should fit in a cache


def selective_scan(x: Float[Array, "B T F"], dt: Float[Array, "B T F"], A: Float[Array, "F N"],
                   B: Float[Array, "B T N"], C: Float[Array, "B T N"], starts: Bool[Array, "B T"],
                   h: Float[Array, "B F N"], form: Form | None = None):
    """The recurrence over a piece.

    Args: x: input; dt >= 0: step sizes (0 at padding leaves the state as it is); A < 0: decay rates; B, C: input and
      output maps; starts: where the state is forgotten before the token; h: the state before the piece. form: None for
      a kernel where one fits, else `Chunked(16)`.
    Returns: y [B, T, F], and the state after the piece [B, F, N]. All in the dtype of `h`.

    Memory of the backward pass: one state a chunk; every state if `Sequential()`, and several times that if
    `Associative()`. Derivatives: reverse mode only, but for `Sequential()`. ValueError for arguments that do not fit
    together, and for `Kernel` where there is no GPU or TPU and it is not interpreted.
    """
    x, dt, A, B, C = _fitting(x, dt, A, B, C, starts, h)
    form = form or (Kernel(CHUNK) if fits(h) else Chunked(CHUNK))
    check_form(form, "selective scans", Sequential, Associative, Chunked, Kernel)
    if x.shape[1] == 1 or isinstance(form, Sequential):
        return sequential(x, dt, A, B, C, starts, h)
    if isinstance(form, Kernel):
        return selective_scan_kernel(x, dt, A, B, C, starts, h, size=form.size, interpret=form.interpret)
    if isinstance(form, Associative):
        return _associative(x, dt, A, B, C, starts, h)
    return _chunked(x, dt, A, B, C, starts, h, form.size)


def sequential(x, dt, A, B, C, starts, h):
    """Step by step: the definition."""
    steps = [jnp.moveaxis(a, 1, 0) for a in (dt, dt * x, B, C, starts)]
    A, h = A.T, jnp.swapaxes(h, 1, 2)  # channels last: they fill the vector registers
    if x.shape[1] == 1:
        h, y = _step(A, h, *(a[0] for a in steps))
        return y[:, None], jnp.swapaxes(h, 1, 2)
    h, y = _chunk(A, h, steps)
    return jnp.moveaxis(y, 0, 1), jnp.swapaxes(h, 1, 2)


def signed_scan(x, dt, A, B, C, starts, h, form: Form | None = None):
    """The same with decays `2 exp(dt A) - 1`, which reach from -1 to 1: a step of size 0 keeps the state, a long one
    turns it to its opposite, and with that it can follow parity (Grazzi et al. 2024, arXiv:2411.12537, section 4).
    All states are in memory, for the gradient and before it. form: of a `diagonal` recurrence."""
    x, dt, A, B, C = _fitting(x, dt, A, B, C, starts, h)
    return _by_states(2 * jnp.exp(dt[..., None] * A) - 1, dt * x, B, C, starts, h, choose(form, x.shape[1], h.dtype))


def _fitting(x, dt, A, B, C, starts, h):
    """The first five in the dtype of `h`. ValueError where shapes do not fit together."""
    check_shapes("BT BFN BTF BTF FN BTN BTN", starts=starts, h=h, x=x, dt=dt, A=A, B=B, C=C)
    return (a.astype(h.dtype) for a in (x, dt, A, B, C))


def _associative(x, dt, A, B, C, starts, h):
    run = functools.partial(in_place, size=x.shape[1])
    return _by_states(jnp.exp(dt[..., None] * A), dt * x, B, C, starts, h, run)


def _by_states(decay, u, B, C, starts, h, run):
    decay = jnp.where(starts[:, :, None, None], 0, decay)
    flat = lambda a: a.reshape(*a.shape[:-2], -1)
    states, last = run(flat(decay), flat(u[..., None] * B[:, :, None]), flat(h))
    return dot("BTFN,BTN->BTF", states.reshape(decay.shape), C), last.reshape(h.shape)


def _chunked(x, dt, A, B, C, starts, h, size):
    length = x.shape[1]
    steps = [jnp.moveaxis(a, 1, 0) for a in (dt, dt * x, B, C, starts)]
    size = min(size, length)
    chunks, pad = -(-length // size), -length % size  # padded steps have dt = 0: the identity
    cut = lambda a: jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape(chunks, size, *a.shape[1:])
    h, y = _scan(A.T, jnp.swapaxes(h, 1, 2), tuple(map(cut, steps)))
    return jnp.moveaxis(y.reshape(chunks * size, *y.shape[2:])[:length], 0, 1), jnp.swapaxes(h, 1, 2)


# From here on time comes first, in chunks; A is [N, F], a state [B, N, F], and u = dt * x. Sums over N and F are dots:
# on a CPU, a product and its sum take several times as long.


def _decay(A, dt, start):
    return jnp.where(start[:, None, None], 0, jnp.exp(dt[:, None, :] * A))


def _advance(A, h, dt, u, B, start):
    return _decay(A, dt, start) * h + B[:, :, None] * u[:, None, :]


def _step(A, h, dt, u, B, C, start):
    h = _advance(A, h, dt, u, B, start)
    return h, dot("BN,BNF->BF", C, h)


def _chunk(A, h, steps):
    return jax.lax.scan(lambda h, now: _step(A, h, *now), h, steps)


@jax.custom_vjp
def _scan(A, h, chunks):
    """The last state, and y [chunks, steps, B, F]."""
    return jax.lax.scan(lambda h, steps: _chunk(A, h, steps), h, chunks)


def _forward(A, h, chunks):
    def run(h, steps):
        last, y = _chunk(A, h, steps)
        return last, (y, h)

    last, (y, firsts) = jax.lax.scan(run, h, chunks)
    return (last, y), (A, firsts, chunks)


def _backward(kept, gradients):
    """With g_t the gradient of h_{t-1} through all that comes after it, and G_t that of h_t:

        G_t = C_t dy_t + g_{t+1}      g_t = exp(dt_t A) G_t       d(dt_t A) = g_t h_{t-1}
        dC_t = h_t . dy_t             dB_t = G_t . u_t            du_t = G_t . B_t
    """
    A, firsts, chunks = kept
    g, dy = gradients
    ones = jnp.ones(g.shape[:2], g.dtype)

    def again(h, now):
        dt, u, B, _, start, dy = now
        after = _advance(A, h, dt, u, B, start)
        return after, (h, dot("BNF,BF->BN", after, dy))

    def back(carry, now):
        g, dA = carry
        dt, u, B, C, start, dy, h = now
        G = g + C[:, :, None] * dy[:, None, :]
        g = _decay(A, dt, start) * G
        rate = g * h
        ddt = dot("BN,BNF->BF", ones, A * rate)
        return (g, dA + dt[:, None, :] * rate), (ddt, dot("BN,BNF->BF", B, G), dot("BNF,BF->BN", G, u))

    def run(carry, chunk):
        first, steps, dy = chunk
        _, (h, dC) = jax.lax.scan(again, first, (*steps, dy))
        carry, (ddt, du, dB) = jax.lax.scan(back, carry, (*steps, dy, h), reverse=True)
        return carry, (ddt, du, dB, dC)

    dA = jnp.zeros_like(g)  # a sum over rows at every step would cost more than a gradient for each row
    (g, dA), steps = jax.lax.scan(run, (g, dA), (firsts, chunks, dy), reverse=True)
    return dA.sum(0), g, (*steps, None)


_scan.defvjp(_forward, _backward)
