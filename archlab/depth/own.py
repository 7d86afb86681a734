"""What each recursion owns of a unit whose weights are otherwise shared: norms, biases, low-rank corrections.

Relaxed recursive transformers: Bae et al. 2024 (arXiv:2410.20672), section 2.3.

A layer that recurs (`Recur`, `MixtureOfRecursions`) builds its unit by `recurring` and takes the unit of one recursion
by `of_recursion`. What is marked as own is stacked [n, ...] there; where nothing is, both cost nothing.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import dims, lettered, reuse, variables_of
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Place
from archlab.layers.low_rank import CorrectedModule


class Own(LayerConfig):
    """`layer`, a norm or any other, with weights of its own for each recursion: `Residual(SwiGLU(F), Own(RMSNorm()))`.

    It builds the layer's own module. Where nothing recurs, it is the layer.
    """

    layer: LayerConfig

    def build(self, rngs: nnx.Rngs, at: Place) -> nnx.Module:
        return _mark(self.layer.build(rngs, at))


class LowRank(LayerConfig):
    """`layer` with a low-rank correction of each of its matrices that each recursion owns; zero at the start.

    Where nothing recurs, there is one correction. Stacked matrices (experts, a `Repeat` inside) are not corrected.

    rank: of the corrections.
    """

    layer: LayerConfig
    rank: int

    def __post_init__(self):
        require(self.rank >= 1, self, "rank", "must be at least 1")

    def build(self, rngs: nnx.Rngs, at: Place) -> "LowRankModule":
        return LowRankModule(self, rngs, at)


class LowRankModule(CorrectedModule):
    """Weights: those of `layer`; down and up per corrected matrix, marked as own."""

    def __init__(self, config: LowRank, rngs: nnx.Rngs, at: Place):
        super().__init__(config.layer, config.rank, rngs, at)
        require(len(self.paths) > 0, config, "layer",
                "has no matrix to correct (those of a Repeat are stacked: put LowRank inside it)")
        _mark(self.down)
        _mark(self.up)


def recurring(config: LayerConfig, n: int, rngs: nnx.Rngs, at: Place, uses: float | None = None) -> nnx.Module:
    """The unit of a layer that applies it `n` times.

    Its own variables hold n copies, drawn one by one, each at its recursion's place in depth, and have the letter L in
    front. The axis of the copies stands next to the variable's own axes: a `Repeat` inside the unit keeps the first.

    Args: uses: through how many of the n recursions a token passes on average, for the accounts; None for all.
    """
    uses = n if uses is None else uses
    unit = config.build(rngs, at)
    structure, own, shared = nnx.split(unit, _is_own, ...)
    reuse(shared, uses)
    if not own:
        return nnx.merge(structure, own, shared)

    def draw(key, i):
        return nnx.state(config.build(nnx.Rngs(key), at._replace(index=at.index + i * config.branches)), _is_own)

    copies = jax.vmap(draw)(jax.random.split(rngs.params(), n), jnp.arange(n))
    placed = []
    for path, variable in nnx.to_flat_state(copies):
        variable = variable.replace(jnp.moveaxis(variable[...], 0, _axis(variable)))
        variable.set_metadata(letters="L" + variable.letters)
        placed.append((path, variable))
    own = nnx.from_flat_state(placed)
    reuse(own, uses / n)
    return nnx.merge(structure, own, shared)


def of_recursion(unit: nnx.Module, i) -> nnx.Module:
    """The unit of recursion `i` (int, may be traced), from what `recurring` made: the shared weights, and its own."""
    structure, own, shared = nnx.split(unit, _is_own, ...)
    if not own:
        return unit
    pick = lambda v: v.replace(jax.lax.dynamic_index_in_dim(v[...], i, _axis(v), keepdims=False))
    return nnx.merge(structure, nnx.from_flat_state([(path, pick(v)) for path, v in nnx.to_flat_state(own)]), shared)


def join_updates(unit: nnx.Module, updates: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What n recursions, stacked [n, ...], want of the unit's variables: summed where these are shared, and otherwise
    each for its own copy."""
    own = {path: v for path, v in variables_of(unit).items() if _is_own(path, v)}
    return {path: jnp.moveaxis(steps, 0, _axis(own[path])) if path in own else steps.sum(0)
            for path, steps in updates.items()}


def _mark(module: nnx.Module) -> nnx.Module:
    for variable in lettered(module).values():
        variable.set_metadata(own=True)
    return module


def _is_own(path, variable) -> bool:
    return variable.get_metadata().get("own", False)


def _axis(variable: nnx.Variable) -> int:
    """Where the copies are: before the variable's own axes, whatever else is stacked in front of them."""
    return -1 - len(dims(variable.letters).lstrip("L"))
