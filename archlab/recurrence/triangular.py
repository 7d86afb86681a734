"""The inverse of triangular matrices: how the corrections of a chunk's tokens to one another are found at once.

Token t corrects what all tokens before it wrote, so that the corrections U of a chunk solve a system of equations,
(I + A) U = R, with A strictly lower triangular. (I + A)^-1 = T is the "UT transform" of Joffrain et al. 2006, as used
by Yang et al. 2024 (arXiv:2406.06484, section 3.2).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from archlab.recurrence.memory import dot

# Where substitution row by row takes over. Products of powers of A, (I - A)(I + A^2)(I + A^4)..., would need none, but
# where many keys are alike the powers grow beyond 1e20 and cancel to an inverse of numbers around 1.
ROWS = 16


@jax.custom_vjp
def unit_inverse(A: Float[Array, "... Q Q"]) -> Float[Array, "... Q Q"]:
    """(I + A)^-1, of what A holds below the diagonal; the rest is not looked at. Derivatives: reverse mode only."""
    Q = A.shape[-1]
    if Q <= ROWS:
        eye = jnp.broadcast_to(jnp.eye(Q, dtype=A.dtype), A.shape)
        return jax.lax.linalg.triangular_solve(A, eye, left_side=True, lower=True, unit_diagonal=True)
    half = Q // 2
    first, last = unit_inverse(A[..., :half, :half]), unit_inverse(A[..., half:, half:])
    below = -_product(last, _product(A[..., half:, :half], first))
    return jnp.concatenate([jnp.pad(first, [(0, 0)] * (A.ndim - 1) + [(0, Q - half)]),
                            jnp.concatenate([below, last], -1)], -2)


def _forward(A):
    inverse = unit_inverse(A)
    return inverse, inverse


def _backward(inverse, gradient):
    """d(I + A)^-1 = -(I + A)^-1 dA (I + A)^-1."""
    gradient = dot("...uq,...uv->...qv", inverse, dot("...uw,...vw->...uv", gradient, inverse))
    return (-jnp.tril(gradient, -1),)


def _product(a, b):
    return dot("...qu,...uv->...qv", a, b)


unit_inverse.defvjp(_forward, _backward)
