"""The selective scan: a diagonal recurrence whose decay and input depend on the token.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t

Gu & Dao 2023, Mamba (arXiv:2312.00752), section 3.2 and algorithm 2.

Time runs step by step, since every channel of every state decays at its own rate and no product of matrices does the
work. The gradient is written by hand: of the states only each chunk's first is kept, the rest of a chunk is computed
again, and the gradients of all six arguments come out of one loop that runs backward.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

CHUNK = 16  # steps between the states that are kept for the backward pass; the states of one chunk should fit a cache

# Sums over N or F are written as dots, which a CPU does in a tenth of the time of a multiplication and a sum; HIGHEST
# because elsewhere a dot would round the state.
dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def selective_scan(x: Float[Array, "B T F"], dt: Float[Array, "B T F"], A: Float[Array, "F N"],
                   B: Float[Array, "B T N"], C: Float[Array, "B T N"], starts: Bool[Array, "B T"],
                   h: Float[Array, "B F N"]):
    """The recurrence over a piece.

    Args: x: input; dt >= 0: step sizes (0 at padding leaves the state as it is); A < 0: decay rates; B, C: input and
      output maps; starts: where the state is forgotten before the token; h: the state before the piece.
    Returns: y [B, T, F], and the state after the piece [B, F, N]. All in the dtype of `h`.

    Memory of the backward pass: one state a `CHUNK` of steps. Derivatives: reverse mode only.
    """
    T = x.shape[1]
    x, dt, B, C = (a.astype(h.dtype) for a in (x, dt, B, C))
    A, h = A.T.astype(h.dtype), jnp.swapaxes(h, 1, 2)  # channels last: they fill the vector registers
    steps = [jnp.moveaxis(a, 1, 0) for a in (dt, dt * x, B, C, starts)]
    if T == 1:
        h, y = forward_step(A, h, *(a[0] for a in steps))
        return y[:, None], jnp.swapaxes(h, 1, 2)

    size = min(CHUNK, max(T, 1))
    chunks, pad = -(-T // size), -T % size  # padded steps have dt = 0: the identity
    cut = lambda a: jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape(chunks, size, *a.shape[1:])
    y, h = scan_chunks(A, h, *map(cut, steps))
    return jnp.moveaxis(y.reshape(chunks * size, *y.shape[2:])[:T], 0, 1), jnp.swapaxes(h, 1, 2)


# Below: time comes first, A is [N, F], states are [B, N, F], and u = dt * x. Chunks add a dimension in front of time.


def decay(A, dt, start):
    return jnp.where(start[:, None, None], 0, jnp.exp(dt[:, None, :] * A))


def forward_step(A, h, dt, u, B, C, start):
    h = decay(A, dt, start) * h + B[:, :, None] * u[:, None, :]
    return h, dot("BN,BNF->BF", C, h)


@jax.custom_vjp
def scan_chunks(A, h, *chunks):
    """Returns: y [chunks, size, B, F], and the last state."""
    step = lambda h, now: forward_step(A, h, *now)
    h, y = jax.lax.scan(lambda h, chunk: jax.lax.scan(step, h, chunk), h, chunks)
    return y, h


def scan_chunks_forward(A, h, *chunks):
    def run(h, chunk):
        last, y = jax.lax.scan(lambda h, now: forward_step(A, h, *now), h, chunk)
        return last, (y, h)

    last, (y, firsts) = jax.lax.scan(run, h, chunks)
    return (y, last), (A, firsts, chunks)


def scan_chunks_backward(kept, gradients):
    """With G_t the gradient of h_t through all that follows, and g_t = exp(dt_t A) G_t that of h_{t-1}:

        G_t = C_t dy_t + g_{t+1}    dC_t = h_t . dy_t    dB_t = G_t . u_t    du_t = G_t . B_t    d(dt_t A) = g_t h_{t-1}
    """
    A, firsts, chunks = kept
    dy, g = gradients
    ones = jnp.ones(g.shape[:2], g.dtype)

    def again(h, now):
        *now, dy = now
        new, _ = forward_step(A, h, *now)
        return new, (h, dot("BNF,BF->BN", new, dy))

    def back(carry, now):
        g, dA = carry
        dt, u, B, C, start, dy, before = now
        G = g + C[:, :, None] * dy[:, None, :]
        g = decay(A, dt, start) * G
        rate = g * before
        ddt = dot("BN,BNF->BF", ones, rate * A)
        return (g, dA + dt[:, None, :] * rate), (ddt, dot("BNF,BN->BF", G, B), dot("BNF,BF->BN", G, u))

    def run(carry, chunk):
        first, *steps = chunk
        _, (before, dC) = jax.lax.scan(again, first, tuple(steps))
        carry, (ddt, du, dB) = jax.lax.scan(back, carry, (*steps, before), reverse=True)
        return carry, (ddt, du, dB, dC)

    carry, steps = jax.lax.scan(run, (g, jnp.zeros_like(g)), (firsts, *chunks, dy), reverse=True)
    return carry[1].sum(0), carry[0], *steps, None


scan_chunks.defvjp(scan_chunks_forward, scan_chunks_backward)
