"""What a model does with a piece of text: which experts are busy, how deep each token goes, how long Mamba's steps are.

Everything is read from `Aux.traces`; a layer that says nothing is passed over.
"""

import dataclasses

import jax
import numpy as np

from archlab.data import Corpus, validation_batches
from archlab.layers.traces import per_layer
from archlab.model import Model
from archlab.training.objectives import prepare, run

# Traces with one number for each token: the name of the trace, and what to call it.
PER_TOKEN = {"depth": "recursions", "steps": "steps before halting", "step_size": "mean step size"}


@dataclasses.dataclass(frozen=True)
class Inside:
    """ids [T]: the text. per_token: label -> values [T], the mean over layers. load [layers, E]: each expert's share
    of the tokens (0 for those a layer does not have), None without experts; layers: the names of its rows."""

    ids: np.ndarray
    per_token: dict[str, np.ndarray]
    load: np.ndarray | None
    layers: list[str]


def look_inside(model: Model, corpus: Corpus, tokenizer, context: int, rows: int = 8) -> Inside:
    """Runs the first rows of a corpus's validation side: loads are taken over all of them, per token over the first."""
    batch = next(iter(validation_batches(corpus, tokenizer, context, rows, limit=1)))
    batch = prepare(model.config, batch, jax.random.key(0))
    traces = jax.jit(lambda m, b: run(m, b).aux.traces)(model, batch)
    traces = {key: np.asarray(value) for key, value in traces.items()}
    length = int((batch.segments[0] > 0).sum())
    per_token = {}
    for name, label in PER_TOKEN.items():
        found = [t.reshape(-1, *t.shape[-2:])[:, 0, :length] for key, t in traces.items()
                 if key.split("/")[-1] == name and t.shape[-2:] == batch.ids.shape]
        if found:
            per_token[label] = np.concatenate(found).mean(0)
    loads = list(per_layer(traces, "load", 1).values())
    most = max(map(len, loads), default=0)
    load = np.stack([np.pad(load, (0, most - len(load))) for load in loads]) if loads else None
    return Inside(np.asarray(batch.ids[0, :length]), per_token, load, [str(i + 1) for i in range(len(loads))])
