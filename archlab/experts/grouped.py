"""The grouped product: rows sorted into blocks, each block times the weight of its own expert.

Kernels do it on GPUs and TPUs: those of `tokamax` where it is installed (extra [kernels]), else `jax.lax.ragged_dot`.
On a CPU that costs what all experts on all rows would, so there a loop runs over the blocks. The loop has a gradient of
its own: differentiated as it stands, each turn of it would add to the whole [E, D, F] gradient; this one adds to one
expert's.
"""

import importlib.util
import sys

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from archlab.layers.contract import wide


def grouped_dot(rows: Float[Array, "R D"], weight: Float[Array, "E D F"], experts: Int[Array, "R/M"]) -> jax.Array:
    """Each block of M consecutive rows times its expert's weight, in the dtype of the rows: [R, F].

    Args: experts: the expert of each block, ascending. Blocks of E, which come last, are nobody's: they cost nothing
    and give zeros.
    """
    if jax.default_backend() == "cpu":
        return _loop_dot(rows, weight, experts)
    return ragged_dot(rows, weight, experts)


def ragged_dot(rows, weight, experts):
    """`grouped_dot` by a kernel for runs of rows of any length."""
    sizes = jnp.zeros(len(weight), jnp.int32).at[experts].add(len(rows) // len(experts), mode="drop")
    weight = weight.astype(rows.dtype)
    return kernel()(rows, weight, sizes, preferred_element_type=wide(rows).dtype).astype(rows.dtype)


def kernel():
    """`tokamax.ragged_dot` or `jax.lax.ragged_dot`, which are called alike. Tokamax takes the first of its own kernels
    that fits the device, shapes and dtypes, and XLA's where none does."""
    if importlib.util.find_spec("tokamax") is None:
        return jax.lax.ragged_dot
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():  # it would take the arguments of any program for absl flags, and end it
        flags.FLAGS(sys.argv[:1])
    return tokamax.ragged_dot


@jax.custom_vjp
def _loop_dot(rows, weight, experts):
    """`grouped_dot` by a loop over the blocks."""
    def multiply(_, block):
        x, e = block
        return None, _unless_nobodys(e, weight, lambda: _dot(x, weight[e].astype(x.dtype)))

    return jax.lax.scan(multiply, None, (_blocks(rows, experts), experts))[1].reshape(len(rows), -1)


def _forward(rows, weight, experts):
    return _loop_dot(rows, weight, experts), (rows, weight, experts)


def _backward(saved, d_out):
    rows, weight, experts = saved

    def body(d_weight, block):
        x, d, e = block
        change, d_x = _unless_nobodys(e, weight, lambda: (_dot(x.T, d).astype(weight.dtype),
                                                          _dot(d, weight[e].astype(x.dtype).T)))
        return jax.lax.dynamic_update_index_in_dim(d_weight, d_weight[e] + change, e, 0), d_x

    blocks = _blocks(rows, experts), _blocks(d_out, experts), experts
    d_weight, d_rows = jax.lax.scan(body, jnp.zeros_like(weight), blocks)
    return d_rows.reshape(rows.shape), d_weight, None


_loop_dot.defvjp(_forward, _backward)


def _unless_nobodys(expert, weight, compute):
    """What `compute` gives, or zeros where the block has no expert."""
    zeros = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(compute))
    return jax.lax.cond(expert < len(weight), compute, zeros)


def _blocks(rows, experts):
    return rows.reshape(len(experts), -1, rows.shape[-1])


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=wide(a).dtype).astype(a.dtype)
