"""The grouped product: rows sorted into blocks, each block times the weight of its own expert.

`jax.lax.ragged_dot` does it well on GPUs and TPUs. On a CPU it costs what all experts on all rows would, so there a
loop runs over the blocks. The loop has a gradient of its own: differentiated as it stands, each turn of it would add
to the whole [E, D, F] gradient; this one adds to one expert's.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from archlab.layers.contract import wide


def grouped_dot(rows: Float[Array, "R D"], weight: Float[Array, "E D F"], experts: Int[Array, "R/M"]) -> jax.Array:
    """Each block of M consecutive rows times its expert's weight, in the dtype of the rows: [R, F].

    Args: experts: the expert of each block, ascending.
    """
    if jax.default_backend() == "cpu":
        return _loop_dot(rows, weight, experts)
    return ragged_dot(rows, weight, experts)


def ragged_dot(rows, weight, experts):
    """`grouped_dot` by `jax.lax.ragged_dot`."""
    sizes = jnp.zeros(len(weight), jnp.int32).at[experts].add(len(rows) // len(experts))
    weight = weight.astype(rows.dtype)
    return jax.lax.ragged_dot(rows, weight, sizes, preferred_element_type=wide(rows).dtype).astype(rows.dtype)


@jax.custom_vjp
def _loop_dot(rows, weight, experts):
    """`grouped_dot` by a loop over the blocks."""
    multiply = lambda _, block: (None, _dot(block[0], weight[block[1]].astype(rows.dtype)))
    return jax.lax.scan(multiply, None, (_blocks(rows, experts), experts))[1].reshape(len(rows), -1)


def _forward(rows, weight, experts):
    return _loop_dot(rows, weight, experts), (rows, weight, experts)


def _backward(saved, d_out):
    rows, weight, experts = saved

    def body(d_weight, block):
        x, d, e = block
        change = d_weight[e] + _dot(x.T, d).astype(weight.dtype)
        d_weight = jax.lax.dynamic_update_index_in_dim(d_weight, change, e, 0)
        return d_weight, _dot(d, weight[e].astype(rows.dtype).T)

    blocks = _blocks(rows, experts), _blocks(d_out, experts), experts
    d_weight, d_rows = jax.lax.scan(body, jnp.zeros_like(weight), blocks)
    return d_rows.reshape(rows.shape), d_weight, None


_loop_dot.defvjp(_forward, _backward)


def _blocks(rows, experts):
    return rows.reshape(len(experts), -1, rows.shape[-1])


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=wide(a).dtype).astype(a.dtype)
