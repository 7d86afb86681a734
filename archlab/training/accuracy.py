"""How often a model's best guess is right, on scored positions: what a task asks, and text does not."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from archlab.data.batches import Batch
from archlab.layers.weights import merge
from archlab.training.objectives import run

LOGITS = 2**22  # logits held at once


@dataclasses.dataclass(frozen=True)
class Score:
    """Sums over scored positions and over rows: nats, right answers and answers; rows with all answers right, rows."""

    nats: float
    right: float
    answers: float
    right_rows: float
    rows: float

    @property
    def loss(self) -> float:
        """Nats per scored position."""
        return self.nats / max(self.answers, 1)

    @property
    def accuracy(self) -> float:
        """The share of scored positions where the likeliest token is the target."""
        return self.right / max(self.answers, 1)

    @property
    def exact(self) -> float:
        """The share of rows in which all answers are right."""
        return self.right_rows / max(self.rows, 1)


def scaled(accuracy: float, chance: float) -> float:
    """0 for guessing, 1 for being right: (accuracy - chance) / (1 - chance), as state tracking is told."""
    return (accuracy - chance) / (1 - chance)


def make_score_step(structure: nnx.GraphDef):
    """A jitted function of (params, rest, batch) that gives the sums of a `Score` over one batch, [5]."""
    def step(params, rest, batch: Batch):
        model = merge(structure, params, rest)
        hidden = run(model, batch).hidden

        def of_row(row):
            logits = model.logits(row[0][None])[0]
            chosen = jnp.take_along_axis(logits, row[1][:, None], axis=1)[:, 0]
            # Between tokens equally likely there is no best guess: a model that says nothing is never right.
            rivals = jnp.sum(logits >= chosen[:, None], axis=1)
            return jax.nn.logsumexp(logits, axis=1) - chosen, rivals == 1

        together = max(1, LOGITS // (batch.ids.shape[1] * model.config.vocab))
        nats, right = jax.lax.map(of_row, (hidden, batch.targets), batch_size=min(together, len(batch.ids)))
        scored = batch.weights > 0
        asked = scored.any(1)
        sums = [jnp.where(scored, nats, 0), scored & right, scored, asked & (right | ~scored).all(1), asked]
        return jnp.stack([jnp.sum(value, dtype=jnp.float32) for value in sums])

    return jax.jit(step)


def score(step, params, rest, batches: Iterable[Batch]) -> Score:
    """The sums over all `batches`; `step` is from `make_score_step`."""
    return Score(*sum(np.asarray(step(params, rest, batch), np.float64) for batch in batches))
