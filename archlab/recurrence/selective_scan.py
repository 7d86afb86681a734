"""The selective scan: a diagonal recurrence whose decay and input depend on the token.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t

Gu & Dao 2023, Mamba (arXiv:2312.00752), section 3.2 and algorithm 2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

CHUNK = 64  # steps between the states that are kept for the backward pass


def selective_scan(x: Float[Array, "B T F"], dt: Float[Array, "B T F"], A: Float[Array, "F N"],
                   B: Float[Array, "B T N"], C: Float[Array, "B T N"], starts: Bool[Array, "B T"],
                   h: Float[Array, "B F N"]):
    """The recurrence over a piece.

    Args: x: input; dt >= 0: step sizes (0 at padding leaves the state as it is); A < 0: decay rates; B, C: input and
      output maps; starts: where the state is forgotten before the token; h: the state before the piece.
    Returns: y [B, T, F], and the state after the piece [B, F, N]. All in the dtype of `h`.

    Time runs by `lax.scan` in chunks whose insides are recomputed in the backward pass, so that memory holds one state
    a chunk and not one a step.
    """
    T = x.shape[1]
    x, dt, B, C = (a.astype(h.dtype) for a in (x, dt, B, C))
    A, h = A.T.astype(h.dtype), jnp.swapaxes(h, 1, 2)  # channels last: they fill the vector registers

    def step(h, now):
        x, dt, B, C, start = now
        decay = jnp.where(start[:, None, None], 0, jnp.exp(dt[:, None, :] * A))
        h = decay * h + B[:, :, None] * (dt * x)[:, None, :]
        return h, (C[:, :, None] * h).sum(1)

    time_first = lambda a: jnp.moveaxis(a, 1, 0)
    steps = tuple(time_first(a) for a in (x, dt, B, C, starts))
    if T == 1:
        h, y = step(h, tuple(a[0] for a in steps))
        return y[:, None], jnp.swapaxes(h, 1, 2)

    chunks, pad = -(-T // CHUNK), -T % CHUNK  # padded steps have dt = 0: the identity
    cut = lambda a: jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape(chunks, CHUNK, *a.shape[1:])
    h, y = jax.lax.scan(jax.checkpoint(lambda h, chunk: jax.lax.scan(step, h, chunk)), h, jax.tree.map(cut, steps))
    return jnp.moveaxis(y.reshape(chunks * CHUNK, *y.shape[2:])[:T], 0, 1), jnp.swapaxes(h, 1, 2)
