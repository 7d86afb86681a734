"""What a model makes of text it has not seen: bits per byte, and the loss by place in the document."""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from archlab.data.batches import Batch
from archlab.layers.contract import Training, count_positions
from archlab.layers.weights import merge
from archlab.model import Model
from archlab.parallel.mesh import global_batch
from archlab.training.objectives import prepare, run


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over all real targets: nats [T] and targets [T] by how many tokens of the document came before in the row;
    the bytes that the targets stand for."""

    nats: np.ndarray
    targets: np.ndarray
    bytes: float

    @property
    def loss(self) -> float:
        """Nats per target."""
        return float(self.nats.sum() / max(self.targets.sum(), 1))

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / (math.log(2) * max(self.bytes, 1)))

    def by_position(self) -> list[tuple[int, int, float, int]]:
        """(first, last, nats per target, targets) for places 0, 1, 2-3, 4-7, ...: each range twice as long."""
        rows, start = [], 0
        while start < len(self.nats):
            end = min(max(2 * start, 1), len(self.nats))
            count = int(self.targets[start:end].sum())
            if count:
                rows.append((start, end - 1, float(self.nats[start:end].sum() / count), count))
            start = end
        return rows


def make_evaluate_step(structure: nnx.GraphDef, bytes_per_token: np.ndarray):
    """A jitted function of (params, rest, batch) that gives the sums of an `Evaluation` over one batch."""
    def step(params, rest, batch: Batch):
        model = merge(structure, params, rest)
        return sums_over(model, prepare(model.config, batch, jax.random.key(0)), bytes_per_token)[0]

    return jax.jit(step)


def sums_over(model: Model, batch: Batch, bytes_per_token: np.ndarray, training: Training | None = None):
    """The sums of an `Evaluation` over one prepared batch, and what layers said. training: for the training form."""
    out = run(model, batch, training)
    nats = model.losses(out.hidden, batch.targets) * batch.weights
    none = jnp.zeros(batch.ids.shape[0], jnp.int32)
    positions, _, _ = count_positions(batch.segments, none, none)
    by_place = lambda values: jnp.zeros(batch.ids.shape[1]).at[positions].add(values)
    length = jnp.sum(jnp.asarray(bytes_per_token)[batch.targets] * batch.weights)
    return (by_place(nats), by_place(batch.weights), length), out.aux


def evaluate(step, params, rest, batches: Iterable[Batch], mesh=None) -> Evaluation:
    """The sums over all `batches`; `step` is from `make_evaluate_step`. ValueError where there is no batch."""
    return Evaluation(*totals(step, params, rest, batches, mesh))


def totals(step, params, rest, batches: Iterable[Batch], mesh=None):
    """The sum over all `batches` of what `step(params, rest, batch)` gives, a pytree, in float64. ValueError where
    there is no batch."""
    total, waiting = None, None

    def add(sums):
        sums = jax.tree.map(lambda value: np.asarray(value, np.float64), sums)
        return sums if total is None else jax.tree.map(np.add, total, sums)

    for batch in batches:
        sums = step(params, rest, batch if mesh is None else global_batch(batch, mesh))
        if waiting is not None:  # one batch late: the device is never waited for
            total = add(waiting)
        waiting = sums
    if waiting is None:
        raise ValueError("there is no batch to evaluate on")
    return add(waiting)
