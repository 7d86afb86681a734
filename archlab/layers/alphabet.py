"""One alphabet of dimensions, and the parameters that speak it.

A parameter says its dimensions once, in one word such as "D->HK": letters before the arrow are summed over when the
parameter is used (inputs), letters after it are produced (outputs). From that word follow initialisation (fan-in),
weight decay (only what has inputs is a matrix), which parameters Muon or Adafactor take for matrices, sharding, the
accounts and the layout in checkpoints. Nothing is ever decided by `ndim`.

    B batch      T time        D model width   H heads        G key-value heads   K head size
    F hidden     E experts     N state size    V vocabulary   L layers            . any other, never sharded
"""

import functools
import math
from collections.abc import Callable

import flax.nnx as nnx
import jax
import jax.numpy as jnp

LARGE, PARTS = 2**17, 4  # on a CPU a vector times a matrix of so many numbers is taken in so many pieces
LETTERS = "BTDHGKFENVL."
COPIES = "LE"  # axes along which whole parameters are stacked: they are no part of any fan-in

# Where a dimension may be split over the mesh. Batch rows are split over all the axes named for B.
MESH_AXES = {"B": ("data", "fsdp", "expert"), "D": "fsdp", "F": "tensor", "H": "tensor", "G": "tensor",
             "V": "tensor", "E": "expert"}


def dims(letters: str) -> str:
    """The letters of a parameter in the order of its array's axes: "D->HK" gives "DHK"."""
    return letters.replace("->", "")


def inputs(letters: str) -> str:
    """The letters summed over, copies left out: "ED->F" gives "D"."""
    return "".join(c for c in letters.split("->")[0] if c not in COPIES)


def outputs(letters: str) -> str:
    """The letters produced: "D->HK" gives "HK"."""
    return letters.split("->")[1]


def is_matrix(letters: str) -> bool:
    """True for what multiplies a vector into another: it has inputs and outputs and is no table over the vocabulary."""
    return bool(inputs(letters)) and bool(outputs(letters)) and "V" not in letters


def parameter(rngs: nnx.Rngs, letters: str, shape: tuple[int, ...], init: Callable | None = None, *,
              scale: float = 1.0, decay: bool | None = None, rate: float = 1.0, uses: float = 1.0) -> nnx.Param:
    """A parameter that knows its letters.

    Args:
      letters: its dimensions, such as "D->HK", one letter an axis.
      shape: their sizes, in that order.
      init: `init(key, shape, dtype)`; by default normal with standard deviation `scale / sqrt(fan_in)` for what has
        input letters, and zeros for what has none.
      scale: multiplies the default standard deviation; may be traced (initialisers that depend on the layer).
      decay: whether weight decay touches it; by default what has input letters. A scalar or a vector of gains,
        biases, time constants does not want to be small.
      rate: its learning rate as a multiple of the run's; 0 for what stays as it was drawn.
      uses: how often one token passes through it, for the accounts: top_k / E for the stacked weights of E experts.

    Returns: an `nnx.Param` in float32 with metadata `letters`, `decay`, `rate` and `uses`.
    """
    if letters.count("->") != 1 or not set(dims(letters)) <= set(LETTERS):
        raise ValueError(f"letters {letters!r}: must be inputs -> outputs, as in 'D->HK' or '->F', of {LETTERS!r}: "
                         "'.' is for any dimension of your own")
    if len(dims(letters)) != len(shape):
        raise ValueError(f"letters {letters!r} name {len(dims(letters))} dimensions, shape {shape} has {len(shape)}")
    if init is None:
        fan_in = math.prod(n for letter, n in zip(dims(letters), shape) if letter in inputs(letters))
        init = fan_in_normal(fan_in, scale) if inputs(letters) else nnx.initializers.zeros
    decay = bool(inputs(letters)) if decay is None else decay
    return nnx.Param(init(rngs.params(), shape, jnp.float32), letters=letters, decay=decay, rate=rate, uses=uses)


class Steered(nnx.Variable):
    """Numbers that no gradient moves and no optimizer sees. Once a step each is moved by `rate` in the direction of the
    sign of its `Aux.updates`, summed over all of the step's tokens."""

    @classmethod
    def zeros(cls, letters: str, shape: tuple[int, ...], rate: float) -> "Steered":
        return cls(jnp.zeros(shape, jnp.float32), letters=letters, rate=rate)


def reuse(module: nnx.Module, times: float) -> None:
    """Notes for the accounts that a token passes `times` times through all of `module`, on average: n for a unit that
    recurs n times, a share below 1 for one that only some tokens are routed to."""
    for variable in parameters_of(module).values():
        variable.set_metadata(uses=times * variable.uses)


def fan_in_normal(fan_in: int, scale: float = 1.0) -> Callable:
    """Normal initialiser with standard deviation `scale / sqrt(fan_in)`."""
    return lambda key, shape, dtype: jax.random.normal(key, shape, dtype) * (scale / math.sqrt(fan_in))


def project(x: jax.Array, weight: nnx.Param, spec: str) -> jax.Array:
    """The one door through which every weight product goes: `einsum(spec, x, weight)` in the dtype of `x`.

    Args:
      x: activations; their dtype is the compute dtype.
      weight: a parameter, kept in its own (usually higher) precision and cast here.
      spec: for example "BTD,DHK->BTHK".

    Products of bfloat16 accumulate in float32: CPUs reach their matrix units only so, accelerators do it anyway.
    """
    if jax.default_backend() == "cpu" and weight.size >= LARGE and x.size % PARTS == 0 and _is_vector(x, spec):
        return _vector_product(x, weight[...].astype(x.dtype), spec)
    return multiply(x, weight[...], spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply(x: jax.Array, weight: jax.Array, spec: str) -> jax.Array:
    """The product itself. Its gradients are written out, because JAX's rule gives that of the weight transposed, and
    XLA's CPU compiler then writes a transposed copy of `dy`: an MLP's forward and backward pass is 1.5 times as fast.
    They come in the weight's own precision.
    """
    return _einsum(spec, x, weight.astype(x.dtype)).astype(x.dtype)


def _multiply_forward(x, weight, spec):
    return multiply(x, weight, spec), (x, weight)


def _multiply_backward(spec, saved, dy):
    x, weight = saved
    x_letters, weight_letters, y_letters = spec.replace("->", ",").split(",")
    dx = _einsum(f"{y_letters},{weight_letters}->{x_letters}", dy, weight.astype(x.dtype))
    dweight = _einsum(f"{x_letters},{y_letters}->{weight_letters}", x, dy)
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


multiply.defvjp(_multiply_forward, _multiply_backward)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _is_vector(x: jax.Array, spec: str) -> bool:
    """Whether all of `x` is summed over, along the first axes of the weight: one token of one row."""
    letters, (before, _, after) = spec.partition(",")[0], spec.partition(",")[2].partition("->")
    summed = "".join(c for c in letters if c in before and c not in after)
    return before.startswith(summed) and x.size == math.prod(n for c, n in zip(letters, x.shape) if c in summed)


def _vector_product(x: jax.Array, matrix: jax.Array, spec: str) -> jax.Array:
    """A vector times a matrix, as `PARTS` pieces of the sum. XLA's CPU compiler gives the plain product to one core and
    the pieces to several: decoding at batch 1 is 1.25 times as fast (11 M parameters, 4 free cores; 0.9 on busy ones).
    """
    pieces = _einsum("PD,PDF->PF", x.reshape(PARTS, -1), matrix.reshape(PARTS, x.size // PARTS, -1))
    sizes = dict(zip(spec.partition(",")[2], matrix.shape))
    return pieces.sum(0).reshape([sizes.get(letter, 1) for letter in outputs(spec)]).astype(x.dtype)


def variables_of(module, kind: type = nnx.Variable) -> dict:
    """Path ("body/unit/layers/0/layer/query") -> variable, in the module's order. Works on abstract modules too."""
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(module, kind))}


def parameters_of(module) -> dict[str, nnx.Param]:
    """The `variables_of` it that are trained."""
    return variables_of(module, nnx.Param)


def lettered(module) -> dict:
    """The `variables_of` it that have letters: parameters, and what is steered beside them. Checkpoints hold these."""
    return {path: variable for path, variable in variables_of(module).items() if "letters" in variable.get_metadata()}
