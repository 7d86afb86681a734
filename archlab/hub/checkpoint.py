"""Folders of Hugging Face checkpoints, loaded and saved whole.

    model = load("Llama-3.2-1B", dtype="bfloat16")
    save(model, "mine")
"""

import dataclasses
import functools
import json
import operator
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from archlab.hub.family import describe, family_of
from archlab.hub.fields import HARMLESS
from archlab.hub.layout import Part, flattened
from archlab.hub.plan import compare, has_own_head, leaves, plan
from archlab.hub.reading import check_dtype, read
from archlab.hub.tensors import INDEX, SHARD, SINGLE, Tensors, write
from archlab.layers.alphabet import lettered
from archlab.layers.weights import merge, split
from archlab.model import LanguageModel, Model
from archlab.parallel.mesh import parameter_shardings

CONFIG = "config.json"


def is_huggingface(folder: str | Path) -> bool:
    """Whether a folder's config.json is of the Hugging Face kind."""
    try:
        return "model_type" in json.loads((Path(folder) / CONFIG).read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def load(folder: str | Path, dtype=None, mesh=None) -> Model:
    """The model of a checkpoint folder: config.json and safetensors, in one file or several with an index.

    Tensors are read one after another into the place where they stay, cast on the way; on a mesh, each process reads
    only what its devices hold.

    Args: dtype: of the parameters ("bfloat16", "float32"); None for each as it is stored. mesh: from `make_mesh`.
    Raises: ValueError for an unknown family; for fields of config.json that are not supported or not understood, all
      of them listed; for tensors that are missing, unexpected or misshapen, all of them listed; for weights in pickles.
    """
    folder, dtype = Path(folder), check_dtype(dtype)
    values = json.loads((folder / CONFIG).read_text())
    family = family_of(values.get("model_type"))
    try:
        config = family.config(values)
        with Tensors(folder) as tensors:
            if config.tied and has_own_head(tensors, family):
                config = dataclasses.replace(config, tied=False)
            model = nnx.eval_shape(lambda: config.build(nnx.Rngs(0)))
            variables = lettered(model)
            wanted = plan(family, config, variables)
            names = compare(wanted, tensors, family, config)
            dtypes = {path: dtype if isinstance(v, nnx.Param) else jnp.float32 for path, v in variables.items()}
            places = None if mesh is None else functools.reduce(operator.or_, parameter_shardings(model, mesh))
            arrays = read(wanted, names, tensors, dtypes, places)
    except ValueError as error:
        raise ValueError(f"{folder} ({values['model_type']}): {error}") from error
    return merge(split(model)[0], arrays)


def save(model: Model, folder: str | Path, fields: dict | None = None, shard: int = SHARD) -> None:
    """Writes a model as a checkpoint folder that transformers can load, whole or not at all.

    Args: fields: more of config.json that says nothing about what the model computes, such as {"eos_token_id": 2};
      {"model_type": "mistral"} chooses the family where several could say the same.
      shard: bytes of a file of weights, beyond which there are several, and an index.
    Raises: ValueError where no family can say all of the model's config, naming what stands in the way of the nearest.
    """
    fields = fields or {}
    if meaningful := sorted(set(fields) - HARMLESS):
        raise ValueError(f"fields = {meaningful}: what the model computes is for its config to say")
    family, values = describe(model.config, fields.get("model_type"))
    config = family.config(values)
    arrays = {path: variable.get_value() for path, variable in lettered(model).items()}
    if set(arrays) != set(_abstract(model.config)):
        raise ValueError("the arrays of this model are not those of its config (an unstacked one: save what it was "
                         "made from)")
    wanted = plan(family, config, _abstract(config))
    if family.copied and not config.tied:
        wanted |= dict.fromkeys(family.copies, wanted[family.outer["embed/table"]])
    source = _Source([blocks.body for blocks in family.blocks], config, model.config, arrays)
    dtype_of = lambda name: source.copy(wanted[name].parts[0]).dtype

    def make(name):
        shape, parts = wanted[name]
        tensor = np.empty(shape, dtype_of(name))
        for part in parts:
            view = source.copy(part)
            for ours, theirs in part.boxes:
                tensor[theirs] = view[ours]
        return tensor

    kinds = {str(a.dtype) for a in split(model)[1].values()}
    values = fields | {name: value for name, value in values.items() if value is not None or name not in fields}
    values["dtype"] = values["torch_dtype"] = str(arrays["embed/table"].dtype) if len(kinds) > 1 else kinds.pop()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = write(folder, {name: stored.shape for name, stored in wanted.items()}, dtype_of, make, shard)
    (folder / f"{CONFIG}.part").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    older = {SINGLE, INDEX, *(file.name for file in folder.glob("model-?????-of-?????.safetensors"))} - set(files)
    for file in [*files, CONFIG]:
        os.replace(folder / f"{file}.part", folder / file)
    for file in older:  # what is left of an older model, last: until then there is a whole one
        (folder / file).unlink(missing_ok=True)


def _abstract(config: LanguageModel) -> dict[str, nnx.Variable]:
    return lettered(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))


class _Source:
    """The arrays of a model, found by the paths of a config that does the same with other repeats."""

    def __init__(self, bodies: list[str], config, own, arrays: dict[str, jax.Array]):
        self.arrays = {path: np.asarray(array) for path, array in arrays.items()}
        self.own = {}  # {path and copy by `config`: path and copy by `own`}
        for body in bodies:
            self.own |= zip(leaves(getattr(config, body), body), leaves(getattr(own, body), body), strict=True)

    def copy(self, part: Part) -> np.ndarray:
        """The copy of a parameter that `part` is about, in the dimensions of its tensor."""
        names = part.path.split("/")
        for path in ("/".join(names[:i]) for i in range(1, len(names))):
            for copy in (None, part.at.get(0)):
                if (path, copy) in self.own:
                    own_path, own_copy = self.own[path, copy]
                    array = self.arrays[own_path + part.path[len(path):]]
                    array = array if own_copy is None else array[own_copy]
                    if copy is None:
                        return flattened(array, part)
                    return flattened(array[None], part._replace(at=part.at | {0: 0}))
        return flattened(self.arrays[part.path], part)
