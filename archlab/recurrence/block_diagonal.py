"""Block-diagonal matrices: each block of channels is mapped by a small matrix of its own."""

from flax import nnx
from jaxtyping import Array, Float

from archlab.layers.alphabet import parameter, project
from archlab.layers.contract import wide


def block_diagonal(rngs: nnx.Rngs, blocks: int, channels: int, init=None) -> nnx.Param:
    """A weight [blocks, K, K] over K = channels / blocks; its letter L says that it is a stack of matrices."""
    K = channels // blocks
    return parameter(rngs, "L.->K", (blocks, K, K), init)


def project_blocks(x: Float[Array, "B T F"], weight: nnx.Param) -> Float[Array, "B T N K"]:
    """`x` through each block, apart, in at least float32: XLA's CPU compiler has no batched products of bfloat16."""
    blocks, K, _ = weight.shape
    return project(wide(x).reshape(*x.shape[:2], blocks, K), weight, "BTNI,NIK->BTNK")
