"""A model in a folder: `config.json` and `model.safetensors`. No code and no pickle, neither written nor read."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from archlab.layers.config import from_json
from archlab.layers.weights import merge, split
from archlab.model import LanguageModel, Model
from archlab.training.step import abstract

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: Model, path: str | Path) -> None:
    """Writes a model into the folder `path`, which is made if need be. Arrays are keyed by their paths in the model.

    ValueError for a model whose arrays are not those of its config (an unstacked one: save what it was made from).
    """
    from safetensors.numpy import save_file

    _, params, rest = split(model)
    arrays = {key: np.asarray(value) for key, value in (params | rest).items()}
    _compare(arrays, model.config, "this model")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{WEIGHTS}.part"
    save_file(arrays, part)
    os.replace(part, folder / WEIGHTS)  # whole or not at all
    (folder / CONFIG).write_text(model.config.to_json())


def load(path: str | Path) -> Model:
    """The model that `save` wrote into the folder `path`, or that of the newest whole checkpoint of a training run.

    A config of one's own must be imported before. ValueError where there is no model, where its files are not whole, or
    where arrays are missing, unknown or of other shapes: all are listed.
    """
    import archlab.zoo

    archlab.zoo.list_models()  # imports every config class of the zoo, so that their names can be resolved
    folder = Path(path)
    if (folder / WEIGHTS).is_file():
        return _load_saved(folder)
    if (folder / "checkpoints").is_dir():
        return _load_run(folder)
    raise ValueError(f"{folder} holds no model: neither {CONFIG} and {WEIGHTS} nor the checkpoints of a training run")


def _load_saved(folder: Path) -> Model:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = from_json((folder / CONFIG).read_text())
        arrays = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the model in {folder} cannot be read: {error}") from error
    if not isinstance(config, LanguageModel):
        raise ValueError(f"{folder / CONFIG} is a {type(config).__name__}; it must be a LanguageModel")
    _compare(arrays, config, str(folder / WEIGHTS))
    structure, _, _ = split(abstract(config))
    return merge(structure, {key: jnp.asarray(value) for key, value in arrays.items()})


def _load_run(folder: Path) -> Model:
    from archlab.training.checkpoints import Checkpoints  # late: orbax takes most of a second

    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        config, params, rest = checkpoints.restore_model(lambda config: split(abstract(config))[1:])
    finally:
        checkpoints.close()
    return merge(split(abstract(config))[0], params, rest)


def _compare(arrays: dict[str, np.ndarray], config: LanguageModel, name: str) -> None:
    _, params, rest = split(abstract(config))
    wanted = params | rest
    says = lambda a: f"{np.dtype(a.dtype).name}{list(a.shape)}"
    lines = [f"missing: {key} {says(wanted[key])}" for key in wanted if key not in arrays]
    lines += [f"unknown: {key} {says(arrays[key])}" for key in arrays if key not in wanted]
    lines += [f"{key} is {says(arrays[key])}, must be {says(wanted[key])}" for key in wanted
              if key in arrays and says(arrays[key]) != says(wanted[key])]
    if lines:
        raise ValueError(f"the arrays of {name} are not those of its config:\n  " + "\n  ".join(lines))
