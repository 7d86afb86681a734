"""Where each token went: what the routers of a mixture of experts did with a text.

Everything is read from `Aux.traces`. Statistics are over real tokens and over all of a token's choices.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from archlab.data import Batch
from archlab.experts.capacity import Capacity
from archlab.layers.contract import Training
from archlab.layers.traces import per_layer
from archlab.model import Model
from archlab.training.objectives import objective, prepare, run


@dataclasses.dataclass(frozen=True)
class ExpertLayer:
    """What one layer's router did.

    path: as `per_layer` has it. load [E]: share of the choices. entropy: mean entropy of a token's probabilities, and
    mean_entropy, that of their mean, in nats. choices [B, T, k]: experts, best first, -1 for nobody; None where the
    layer did not see every token of the text. weights [B, T, k]: of the choices, where the layer tells them.
    dropped: the share of choices that found no room in the training form, None without a capacity. lost [B, T]: how
    many of a token's choices those were, where the layer tells it.
    """

    path: str
    load: np.ndarray
    entropy: float
    mean_entropy: float
    max_violation: float
    largest_logit: float
    choices: np.ndarray | None
    weights: np.ndarray | None = None
    dropped: float | None = None
    lost: np.ndarray | None = None


def look(model: Model, batch: Batch, key: jax.Array) -> list[ExpertLayer]:
    """Runs a batch through a model, and where some layer has a capacity its training form too, for what that drops.

    Args: batch: padding last in each row. key: of the training form's random numbers.
    Raises: ValueError for a model without experts.
    """
    capacities = [config.rows for _, config in model.config.walk() if isinstance(config, Capacity)]
    rows = len(batch.ids)
    batch = _filled(batch, -rows % math.lcm(*capacities))
    if objective(model.config) == "second half":
        batch = prepare(model.config, batch, key)
    traces = jax.device_get(jax.jit(lambda m, b: run(m, b).aux.traces)(model, batch))
    loads = per_layer(traces, "load", 1)
    if not loads:
        raise ValueError("this model has no layer with experts, so there is nothing to see here: it takes a mixture of "
                         "experts, such as mixture-of-experts-tiny or jamba-tiny")
    numbers = {name: per_layer(traces, name, 0) for name in ("entropy", "mean_entropy", "max_violation",
                                                             "largest_logit")}
    trained = {}
    if capacities:
        training = Training(key, jnp.int32(0))
        trained = jax.device_get(jax.jit(lambda m, b, t: run(m, b, t).aux.traces)(model, batch, training))
    dropped = per_layer(trained, "dropped", 0)
    token_wise = lambda traces, name: {path: _over_text(value, batch, path)[:rows]
                                       for path, value in per_layer(traces, name, 3).items()
                                       if _sees_all(value, batch, path)}
    choices, weights = token_wise(traces, "choices"), token_wise(traces, "weights")
    asked, kept = token_wise(trained, "choices"), token_wise(trained, "kept")
    return [ExpertLayer(path, load, **{name: float(values.get(path, np.nan)) for name, values in numbers.items()},
                        choices=choices.get(path), weights=weights.get(path),
                        dropped=float(dropped[path]) if path in dropped else None,
                        lost=((asked[path] >= 0) & (kept[path] < 0)).sum(-1) if path in kept else None)
            for path, load in loads.items()]


def _filled(batch: Batch, more: int) -> Batch:
    """With `more` rows of padding: a capacity may be shared by so many rows."""
    return jax.tree.map(lambda a: np.pad(a, ((0, more), (0, 0))), batch)


def _reader(batch: Batch, path: str) -> np.ndarray:
    """The segments of what the layer reads."""
    return batch.source_segments if path.startswith("encoder/") else batch.segments


def _sees_all(trace, batch: Batch, path: str) -> bool:
    return trace.shape[:2] == _reader(batch, path).shape


def _over_text(trace: np.ndarray, batch: Batch, path: str) -> np.ndarray:
    """[B, T, k] over the whole text, of which an encoder has read the beginning and its decoder the rest."""
    if batch.source is None:
        return trace
    before, after = batch.source.shape[1], batch.ids.shape[1]
    pad = (0, after) if path.startswith("encoder/") else (before, 0)
    return np.pad(trace, ((0, 0), pad, (0, 0)), constant_values=-1)


def coactivation(choices: np.ndarray, experts: int) -> np.ndarray:
    """[E, E]: of the tokens that went to expert i, the share that went to j as well (OLMoE, arXiv:2409.02060, section
    5.2); 0 on the diagonal, and in the row of an expert nobody chose. choices [..., k]: -1 for nobody."""
    went = _went(choices.reshape(-1, choices.shape[-1]), experts).astype(float)
    together = went.T @ went
    counts = together.diagonal().copy()
    np.fill_diagonal(together, 0)
    return together / np.maximum(counts, 1)[:, None]


def load_by_class(choices: np.ndarray, classes: np.ndarray, count: int, experts: int) -> np.ndarray:
    """[classes, E]: the share of each class's choices that fell on each expert; 0 for a class without a token.

    Args: choices [N, k]: -1 for nobody; classes [N]: of each token, from 0 to count - 1.
    """
    totals = np.zeros((count, experts))
    token, place = np.nonzero(choices >= 0)
    np.add.at(totals, (classes[token], choices[token, place]), 1)
    return totals / np.maximum(totals.sum(1, keepdims=True), 1)


def load_over_training(rows: Sequence[dict], path: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [S] and loads [S, E] of a layer from the rows of a run's experts.jsonl; S is 0 where it is not there."""
    found = [(row["step"], row["load"][path]) for row in rows if path in row.get("load", {})]
    return np.array([step for step, _ in found], int), np.array([load for _, load in found], float)


def _went(choices: np.ndarray, experts: int) -> np.ndarray:
    """Whether each token [N, k] went to each expert: bool [N, E]."""
    went = np.zeros((len(choices), experts + 1), bool)  # the last is nobody: index -1
    np.put_along_axis(went, choices % (experts + 1), True, axis=1)
    return went[:, :-1]
