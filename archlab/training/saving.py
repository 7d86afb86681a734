"""A model in a folder: `config.json` and `model.safetensors`. No code and no pickle, neither written nor read.

Three kinds of folder are known: our own, that of a training run, and the Hugging Face world's (archlab.hub).
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from archlab import hub
from archlab.hub.layout import whole
from archlab.hub.plan import Stored
from archlab.hub.reading import check_dtype, read
from archlab.hub.tensors import Tensors
from archlab.layers.config import from_json, near
from archlab.layers.weights import merge, split
from archlab.model import LanguageModel, Model
from archlab.parallel.mesh import parameter_shardings
from archlab.training.step import abstract

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMATS = ("archlab", "huggingface")


def save(model: Model, path: str | Path, format: str = "archlab", fields: dict | None = None) -> None:
    """Writes a model into the folder `path`, which is made if need be.

    Args: format: "archlab": config.json is our own, and arrays are keyed by their paths in the model; "huggingface":
      a checkpoint folder that transformers can load, if it has the architecture. fields: of its config.json that our
      configs do not hold, such as {"eos_token_id": 2, "max_position_embeddings": 4096} (`archlab.hub.save`).
    Raises: ValueError for a folder that holds a training run; for a model whose arrays are not those of its config (an
      unstacked one: save what it was made from); for what no family of Hugging Face checkpoints has.
    """
    from safetensors.numpy import save_file

    if format not in FORMATS:
        raise ValueError(f"format = {format!r}: {near(str(format), FORMATS)}")
    if (Path(path) / "checkpoints").is_dir():
        raise ValueError(f"{path} holds a training run: save the model into a folder of its own")
    if format == "huggingface":
        return hub.save(model, path, fields)
    _, params, rest = split(model)
    arrays = {key: np.asarray(value) for key, value in (params | rest).items()}
    _compare(arrays, model.config, "this model")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{WEIGHTS}.part"
    save_file(arrays, part)
    os.replace(part, folder / WEIGHTS)  # whole or not at all
    (folder / CONFIG).write_text(model.config.to_json())


def load(path: str | Path, dtype=None, mesh=None) -> Model:
    """The model that `save` wrote into the folder `path`, that of the newest whole checkpoint of a training run, or
    that of a Hugging Face checkpoint (`archlab.hub.load`).

    A config of one's own must be imported before.

    Args: dtype: of the parameters ("bfloat16", "float32"); None for each as it is stored. mesh: from `make_mesh`; the
      parameters then lie where it wants them.
    Raises: ValueError where there is no model, where its files are not whole, or where arrays are missing, unknown or
      of other shapes: all are listed.
    """
    import archlab.zoo

    folder, dtype = Path(path), check_dtype(dtype)
    if hub.is_huggingface(folder):
        return hub.load(folder, dtype, mesh)
    archlab.zoo.list_models()  # imports every config class of the zoo, so that their names can be resolved
    if (folder / WEIGHTS).is_file():
        return _load_saved(folder, dtype, mesh)
    if (folder / "checkpoints").is_dir():
        return _load_run(folder, dtype, mesh)
    raise ValueError(f"{folder} holds no model: neither {CONFIG} and {WEIGHTS} nor the checkpoints of a training run")


def _load_saved(folder: Path, dtype, mesh) -> Model:
    try:
        config = from_json((folder / CONFIG).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the model in {folder} cannot be read: {error}") from error
    if not isinstance(config, LanguageModel):
        raise ValueError(f"{folder / CONFIG} is a {type(config).__name__}; it must be a LanguageModel")
    with Tensors(folder) as tensors:
        _compare(tensors.found, config, str(folder / WEIGHTS))
        structure, params, rest = split(abstract(config))
        wanted = {key: Stored(value.shape, [whole(key, value.shape)]) for key, value in (params | rest).items()}
        dtypes = dict.fromkeys(params, dtype) | dict.fromkeys(rest)
        arrays = read(wanted, {key: key for key in wanted}, tensors, dtypes, _shardings(config, mesh))
    return merge(structure, arrays)


def _load_run(folder: Path, dtype, mesh) -> Model:
    from archlab.training.checkpoints import Checkpoints  # late: orbax takes most of a second

    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        config, params, rest = checkpoints.restore_model(lambda config: split(abstract(config))[1:])
    finally:
        checkpoints.close()
    params = {key: value if dtype is None else value.astype(dtype) for key, value in params.items()}
    if mesh is not None:
        params, rest = jax.device_put((params, rest), parameter_shardings(abstract(config), mesh))
    return merge(split(abstract(config))[0], params, rest)


def _shardings(config: LanguageModel, mesh) -> dict | None:
    if mesh is None:
        return None
    params, rest = parameter_shardings(abstract(config), mesh)
    return params | rest


def _compare(arrays: dict, config: LanguageModel, name: str) -> None:
    _, params, rest = split(abstract(config))
    wanted = params | rest
    says = lambda a: f"{'unreadable' if a.dtype is None else np.dtype(a.dtype).name}{list(a.shape)}"

    def same(key):
        a, b = arrays[key], wanted[key]
        kinds = a.dtype == b.dtype or key in params and a.dtype is not None and jnp.issubdtype(a.dtype, jnp.floating)
        return kinds and tuple(a.shape) == tuple(b.shape)

    lines = [f"missing: {key} {says(wanted[key])}" for key in wanted if key not in arrays]
    lines += [f"unknown: {key} {says(arrays[key])}" for key in arrays if key not in wanted]
    lines += [f"{key} is {says(arrays[key])}, must be {says(wanted[key])}" for key in wanted
              if key in arrays and not same(key)]
    if lines:
        raise ValueError(f"the arrays of {name} are not those of its config:\n  " + "\n  ".join(lines))
