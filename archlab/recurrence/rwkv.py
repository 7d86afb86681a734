"""What the layers of RWKV-4 to RWKV-7 share: how they begin, their low-rank maps, the norm of their heads.

Their initialisation depends on the depth, as that of the official training code does (github.com/BlinkDL/RWKV-LM).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import require
from archlab.layers.contract import Place, pytree, wide
from archlab.layers.norms import LayerNorm, NormModule
from archlab.recurrence.memory import MemoryState
from archlab.recurrence.shift import ShiftState

HEAD_EPS = 64e-5  # of the norm of heads: 1e-5, were they divided by 8 first, as RWKV-5 does it


@pytree
class TimeMixState:
    """shift: the token before; memory: the matrices of the heads."""

    shift: ShiftState
    memory: MemoryState

    @classmethod
    def zeros(cls, batch: int, width: int, heads: int, size: int, dtype) -> "TimeMixState":
        return cls(ShiftState.zeros(batch, width, dtype), MemoryState.zeros(batch, heads, size, size, dtype))


class Depth(NamedTuple):
    """How deep a layer lies. rising: from 0 in the first layer to 1 in the last; falling: from 1 to nearly 0; share: of
    all layers those up to this one, itself included."""

    rising: float | Float[Array, ""]
    falling: float | Float[Array, ""]
    share: float | Float[Array, ""]

    @classmethod
    def of(cls, at: Place) -> "Depth":
        """Of a layer in blocks of two branches, time mix and channel mix."""
        layer, layers = at.index // 2, max(at.depth // 2, 1)
        return cls(layer / max(layers - 1, 1), 1 - layer / layers, (1 + layer) / layers)


def channels(width: int) -> Float[Array, "D"]:
    """0, 1/D, ..., (D-1)/D."""
    return jnp.arange(width) / width


def span(width: int) -> Float[Array, "D"]:
    """From 0 to 1, both included."""
    return jnp.arange(width) / max(width - 1, 1)


def zigzag(width: int) -> Int[Array, "D"]:
    """0, 1, -1, 0, 1, -1, ..."""
    return (jnp.arange(width) + 1) % 3 - 1


def given(values: Array):
    """The initialiser that takes these values, for any shape that holds as many."""
    return lambda key, shape, dtype: jnp.reshape(values, shape).astype(dtype)


def orthogonal(gain: float = 1.0):
    """Orthogonal rows or columns, whichever are fewer, of length `gain`. The first axis holds the inputs."""
    def init(key, shape, dtype):
        flat = nnx.initializers.orthogonal(gain)(key, (shape[0], math.prod(shape[1:])), dtype)
        return flat.reshape(shape)

    return init


def uniform(bound: float):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class LowRank(nnx.Module):
    """`bias + act(x down) up`, for every channel of every head. Weights: down [D, R], up [R, H, K], bias [H, K].

    Starts as its bias: down is zero. As published, no weight decay touches it. bias: its values [D], or None for none;
    rate: its learning rate, as a multiple of the run's. up: the initialiser of `up`.
    """

    def __init__(self, rngs: nnx.Rngs, width: int, rank: int, heads: int, up, bias=None, rate: float = 1.0):
        shape = heads, width // heads
        self.down = parameter(rngs, "D->.", (width, rank), nnx.initializers.zeros, decay=False)
        self.up = parameter(rngs, ".->HK", (rank, *shape), up, decay=False)
        self.bias = None if bias is None else parameter(rngs, "->HK", shape, given(bias), rate=rate)

    def __call__(self, x: Float[Array, "B T D"], act=lambda h: h) -> Float[Array, "B H T K"]:
        y = wide(project(act(project(x, self.down, "BTD,DR->BTR")), self.up, "BTR,RHK->BHTK"))
        return y if self.bias is None else y + self.bias[...][:, None, :]


def head_norm(rngs: nnx.Rngs, heads: int, size: int, depth: Depth) -> NormModule:
    """LayerNorm of each head's channels, of [..., H, K]. The deeper, the larger it begins."""
    norm = NormModule(LayerNorm(eps=HEAD_EPS), rngs, (heads, size), "->HK")
    norm.scale = parameter(rngs, "->HK", (heads, size), given(jnp.full(heads * size, depth.share**0.7)))
    return norm


def matrices(rngs: nnx.Rngs, width: int, heads: int, init):
    """A weight [D, H, K] that maps a token to all channels of all heads."""
    return parameter(rngs, "D->HK", (width, heads, width // heads), init)


def check_heads(config, width: int) -> None:
    """Raises ValueError where heads of `config.head_size` channels do not fill the stream."""
    require(width % config.head_size == 0, config, "head_size", f"must divide the width {width}")
