"""Named architectures. Each file of this room is a family: expressions in `CONFIGS`, published sizes and small ones.

A new file is found by itself; the laws are then tested over its `-nano` entries, and every experiment knows its names.
"""

import functools
import importlib
import pkgutil
from fnmatch import fnmatch

from flax import nnx

from archlab.layers.config import near
from archlab.model import LanguageModel, Model


@functools.cache
def _configs() -> dict[str, LanguageModel]:
    found = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        for name, config in importlib.import_module(f"{__name__}.{module.name}").CONFIGS.items():
            if name in found:
                raise ValueError(f"two families of the zoo name a model {name!r}")
            found[name] = config
    return found


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo that match a glob: `list_models("*-tiny")`."""
    return [name for name in _configs() if fnmatch(name, pattern)]


def get_config(name: str, **overrides) -> LanguageModel:
    """The config of that name; keywords replace fields of the `LanguageModel`. ValueError offers near names."""
    configs = _configs()
    if name not in configs:
        raise ValueError(f"no model named {name!r}; {near(name, list(configs))}")
    config = configs[name]
    for field, value in overrides.items():
        config = config.set(field, value)
    return config


def create_model(model: str | LanguageModel, rngs: nnx.Rngs, **overrides) -> Model:
    """Builds a model from a name or a config; keywords replace fields of the `LanguageModel`.

    Args: rngs: where the weights come from, `nnx.Rngs(0)`.
    """
    config = get_config(model) if isinstance(model, str) else model
    for field, value in overrides.items():
        config = config.set(field, value)
    return config.build(rngs)
