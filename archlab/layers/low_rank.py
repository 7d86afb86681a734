"""Low-rank corrections of a layer's matrices: `W + A B`, with A [rows, rank] and B [rank, columns].

Hu et al. 2021 (arXiv:2106.09685), section 4.1, without its factor alpha / rank.
"""

import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import COPIES, dims, inputs, is_matrix, parameter, parameters_of
from archlab.layers.config import LayerConfig
from archlab.layers.contract import Layer, Place, Tokens


class CorrectedModule(Layer):
    """`layer` with a low-rank term on each of its matrices, zero at the start; with rank 0 the layer itself.

    Rows are a matrix's inputs, columns its outputs. Stacked matrices (experts, the copies of a `Repeat`) get no term.
    Weights: those of `layer`; lists of down [rows, rank] and up [rank, columns].
    """

    def __init__(self, layer: LayerConfig, rank: int, rngs: nnx.Rngs, at: Place):
        self.layer = layer.build(rngs, at)
        found = {path: p for path, p in parameters_of(self.layer).items() if rank and _is_one_matrix(p)}
        # Found once, here: where copies are stacked later on, the letters of a weight no longer tell.
        self.paths = tuple(found)
        self.down, self.up = nnx.List([]), nnx.List([])
        for weight in found.values():
            rows, columns = _matrix_shape(weight)
            self.down.append(parameter(rngs, "D->.", (rows, rank)))
            self.up.append(parameter(rngs, ".->D", (rank, columns), nnx.initializers.zeros))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return self.corrected().init_state(batch, max_length, dtype, memory)

    def __call__(self, x, tokens: Tokens, state=None):
        y, state, aux = self.corrected()(x, tokens, state)
        return y, state, aux.under("layer")

    def corrected(self) -> Layer:
        """The layer with its terms added to its weights."""
        if not self.paths:
            return self.layer
        structure, state = nnx.split(self.layer)
        weights = {"/".join(map(str, path)): (path, weight) for path, weight in nnx.to_flat_state(state)}
        for name, down, up in zip(self.paths, self.down, self.up):
            path, weight = weights[name]
            weights[name] = path, weight.replace(weight[...] + (down[...] @ up[...]).reshape(weight.shape))
        return nnx.merge(structure, nnx.from_flat_state(list(weights.values())))


def _is_one_matrix(weight: nnx.Param) -> bool:
    return is_matrix(weight.letters) and dims(weight.letters)[0] not in COPIES


def _matrix_shape(weight: nnx.Param) -> tuple[int, int]:
    rows = 1
    for letter, size in zip(dims(weight.letters), weight.shape):
        rows *= size if letter in inputs(weight.letters) else 1
    return rows, weight.size // rows
