"""Floating-point operations of a function, counted from its jaxpr: nothing is compiled, nothing is allocated.

Compilers report a loop's body once, whatever its length; here a `scan` counts its body times its length, and every
inner program is entered: jit, checkpoint, custom derivatives, conditionals, shard_map and Pallas kernels. What no
result depends on is not counted, for no compiler keeps it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

# What moves, compares, draws or labels numbers without computing with them. Everything else that gives floats costs
# one operation for each element of its largest operand or result.
MOVES = set("""
    all_gather all_gather_invariant all_to_all argmax argmin broadcast_in_dim concatenate convert_element_type copy
    copy_p device_put dynamic_slice dynamic_update_slice empty expand_dims full gather get iota masked_load masked_swap
    mesh_cast optimization_barrier pad pbroadcast pcast ppermute program_id pvary ragged_all_to_all real imag
    reduce_precision reshape reshard rev select_n sharding_constraint slice sort split squeeze stop_gradient swap tie_in
    top_k transpose
""".split())


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations. A multiply-add is two.

    matmul: of matrix products, convolutions and triangular systems. elementwise: of everything else, one for each
    element, whether it is an addition, an exponential or a term of a sum. They are ordered by their total.
    """

    matmul: float = 0
    elementwise: float = 0

    @property
    def total(self) -> float:
        return self.matmul + self.elementwise

    def __lt__(self, other: Self) -> bool:
        return self.total < other.total

    def __add__(self, other: Self) -> Self:
        return Flops(self.matmul + other.matmul, self.elementwise + other.elementwise)

    def __mul__(self, times: float) -> Self:
        return Flops(self.matmul * times, self.elementwise * times)

    def __truediv__(self, parts: float) -> Self:
        return Flops(self.matmul / parts, self.elementwise / parts)


def count(fn, *args, cond: Callable[[list[Flops]], Flops] = max) -> Flops:
    """The operations of one call `fn(*args)`; arguments may be arrays or `jax.ShapeDtypeStruct`s, in any pytree.

    A `while` loop does not say how often it runs, so its body counts once (loops of a length known when traced are
    scans, and right). Inside `shard_map` all devices count.

    Args: cond: what a conditional costs, from what each of its branches does (of `lax.cond`, the false one is first):
      `max` for the dearer, `min` for the cheaper, such as a step that skips its work.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return _program(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], cond)


def _program(jaxpr: Jaxpr, cond) -> Flops:
    return sum((_operation(eqn, cond) for eqn in jaxpr.eqns), Flops())


def _operation(eqn, cond) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    if name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
        operand = eqn.invars[0].aval
        wide = 4 if jnp.issubdtype(operand.dtype, jnp.complexfloating) else 1  # a complex product is four real ones
        return Flops(matmul=2 * wide * _products(name, params, eqn))
    if name == "triangular_solve":  # n^2 for each right-hand side
        return Flops(matmul=eqn.invars[0].aval.shape[-1] * eqn.invars[1].aval.size)
    if name.startswith("scatter"):  # its jaxpr says how one element is combined
        adds = name != "scatter" and _is_float(eqn.outvars[0].aval)
        return Flops(elementwise=eqn.invars[2].aval.size if adds else 0)
    if name == "fft":  # 5 n log2 n, the usual figure for a complex transform
        n = math.prod(params["fft_lengths"])
        batch = max(v.aval.size for v in (*eqn.invars, *eqn.outvars)) / n
        return Flops(elementwise=5 * batch * n * math.log2(max(n, 2)))
    inner = [p for value in params.values() for p in _programs_in(value)]
    if inner and not name.startswith("reduce"):
        inside = [_program(p, cond) for p in inner]
        return cond(inside) if name == "cond" else _inside(name, params, sum(inside, Flops()))
    if name in MOVES or not any(_is_float(v.aval) for v in eqn.outvars):
        return Flops()
    complex_cost = 6 if name in ("mul", "div") else 2
    cost = complex_cost if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating) else 1
    return Flops(elementwise=cost * max(v.aval.size for v in (*eqn.invars, *eqn.outvars) if hasattr(v.aval, "size")))


def _inside(name: str, params: dict, once: Flops) -> Flops:
    """The cost of an operation that runs whole programs, of which all once cost `once`."""
    if name == "scan":
        return once * params["length"]
    if name == "shard_map":
        axes = params.get("newly_manual_axes") or params.get("manual_axes") or params["mesh"].axis_names
        return once * math.prod(params["mesh"].shape[axis] for axis in axes)
    if name == "pallas_call":
        return once * math.prod(params["grid_mapping"].grid)
    return once


def _products(name: str, params: dict, eqn) -> int:
    """How many multiply-adds a matrix product or a convolution makes."""
    left, right = eqn.invars[0].aval, eqn.invars[1].aval
    if name == "conv_general_dilated":
        features = right.shape[params["dimension_numbers"].rhs_spec[0]]
        return eqn.outvars[0].aval.size * right.size // features
    if name == "dot_general":
        numbers, groups = params["dimension_numbers"], ()
    else:  # each row of the left meets one group of the right, so groups are no dimension of the work
        ragged = params["ragged_dot_dimension_numbers"]
        numbers, groups = ragged.dot_dimension_numbers, ragged.rhs_group_dimensions
    (_, contracted), (_, batch) = numbers
    done = {*contracted, *batch, *groups}
    return left.size * math.prod(size for axis, size in enumerate(right.shape) if axis not in done)


def _programs_in(value) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    return [p for item in value for p in _programs_in(item)] if isinstance(value, (tuple, list)) else []


def _is_float(aval) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)
