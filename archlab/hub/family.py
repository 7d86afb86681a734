"""A family of checkpoints: one value in one file of `families/`, and how such files are found."""

import dataclasses
import functools
import importlib
import math
import pkgutil
import sys
from collections.abc import Callable, Iterator

from archlab.attention.attention import Attention
from archlab.attention.cross import CrossAttention
from archlab.attention.positions import Rotary
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.hub import families
from archlab.hub.fields import Fields
from archlab.layers.config import Config, LayerConfig, near
from archlab.layers.repeat import Repeat
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.mamba import Mamba
from archlab.recurrence.rg_lru import RGLRU

FOREIGN = 1000  # more than any number of fields in which a config of a family's own form differs


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of one body of the model.

    names: {path in our block: name in theirs}, see `layout.rules`; a function of the config where it decides.
    prefix: what stands before these names; {i} is the number of the block. body: the model's field with the `Sequence`
    of ours; those of its children that `Family.outer` names are no blocks. inputs_first: matrices are stored as
    [inputs, outputs], as GPT-2's Conv1D has them and torch's Linear has not.
    """

    names: dict | Callable[[LanguageModel], dict]
    prefix: str = "model.layers.{i}."
    body: str = "body"
    inputs_first: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """All that one family needs.

    model_types: what config.json calls it; the first is written. architecture: the class of transformers, as written.
    defaults: the fields of its config class there, as they are where a file does not write them.
    read: from `Fields` to a `LanguageModel`. write: its inverse, from a config to a dictionary of fields; it may fail
      in any way on a config that is not of this family: what it writes is read again and compared.
    outer: {our path: their name} of all that is in no block. blocks: the rest.
    spelling: the family's own names of common fields, {"hidden_size": "n_embd"}.
    base: a prefix of names that the hub's files sometimes lack. inside: one that names have where the model is a part
      of a larger one. buffers: patterns of tensors that are no parameters, or a function of the config that gives
      them.
    copies: names under which files hold the embedding once more, or only so. copied: whether they are written, too,
      where the head is not tied. zeros: names of tensors that files may lack, because they are zero there.
    """

    model_types: tuple[str, ...]
    architecture: str
    defaults: dict
    read: Callable[[Fields], LanguageModel]
    write: Callable[[LanguageModel], dict]
    outer: dict
    blocks: tuple[Blocks, ...]
    spelling: dict = dataclasses.field(default_factory=dict)
    base: str = "model."
    inside: str = ""
    buffers: tuple[str, ...] | Callable[[LanguageModel], tuple[str, ...]] = ()
    copies: tuple[str, ...] = ()
    copied: bool = False
    zeros: tuple[str, ...] = ()

    def config(self, values: dict) -> LanguageModel:
        """The config that the fields of a config.json describe. ValueError lists all that is not supported; a value of
        which no layer can be made ends the list, for nobody read what comes after it."""
        fields = Fields(values, self.defaults, self.spelling)
        try:
            config = self.read(fields)
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            fields.finish(f"{error} (the reading ended here: there may be more)")
        fields.finish()
        return config

    def fields(self, config: LanguageModel) -> dict:
        """The fields of a config.json that describe `config`; `Unsayable` where this family cannot say all of it."""
        try:
            values = {"model_type": self.model_types[0], "architectures": [self.architecture], **self.write(config)}
        except Exception as error:  # whatever `write` stumbles over in a config of another form
            raise Unsayable([], math.inf) from error
        values = {self.spelling.get(name, name): value for name, value in values.items()}
        try:
            again = self.config(values)
        except ValueError as error:
            raise Unsayable([line.strip() for line in str(error).splitlines()[1:]], FOREIGN) from error
        if type(config) is not type(again):
            raise Unsayable([], math.inf)
        if differences := list(_differences(settled(config), settled(again))):
            raise Unsayable(differences, len(differences))
        return values


@functools.cache
def all_families() -> dict[str, Family]:
    """{model_type: family}, from every file of `families/`."""
    found: dict[str, Family] = {}
    for module in sorted(pkgutil.iter_modules(families.__path__), key=lambda m: m.name):
        family = importlib.import_module(f"{families.__name__}.{module.name}").FAMILY
        if known := sorted(set(family.model_types) & set(found)):
            raise ValueError(f"two families of the hub read {known}")
        found.update(dict.fromkeys(family.model_types, family))
    return found


def family_of(model_type: str) -> Family:
    """The family that reads a config.json of this `model_type`. ValueError offers near names."""
    found = all_families()
    if not isinstance(model_type, str) or model_type not in found:
        raise ValueError(f"model_type = {model_type!r} is no family that can be read; "
                         f"{near(str(model_type), list(found))}")
    return found[model_type]


def describe(config: LanguageModel, model_type: str | None = None) -> tuple[Family, dict]:
    """The family that can say all of a config, and the fields of its config.json.

    Args: model_type: which family; None for Llama where several can, or else that which needs the fewest fields.
    Raises: ValueError naming the layers that no family knows, or else what stands in the way of the nearest.
    """
    found, obstacles = [], []
    some = all_families().values() if model_type is None else [family_of(model_type)]
    for family in {id(family): family for family in some}.values():
        try:
            values = family.fields(config)
            found.append((values["model_type"] != "llama", len(values), family.model_types[0], values))
        except Unsayable as obstacle:
            obstacles.append((obstacle.distance, family.model_types[0], obstacle.lines))
    if found:
        *_, name, values = min(found)
        return family_of(name), values
    kinds = {type(part) for _, part in settled(config).walk() if isinstance(part, LayerConfig)}
    if strange := kinds - known_layers():
        raise ValueError(f"no family of Hugging Face checkpoints has this architecture: none knows {_names(strange)}")
    distance, name, lines = min(obstacles)
    if distance == math.inf:
        which = "no family of Hugging Face checkpoints" if model_type is None else f"no checkpoint of {name}"
        raise ValueError(f"{which} has this architecture: a model made so of {_names(kinds)}")
    raise ValueError(f"no family of Hugging Face checkpoints has this architecture; the nearest is {name}:\n  "
                     + "\n  ".join(lines[:5]))


@functools.cache
def known_layers() -> set[type]:
    """The types of layers that some file of the hub imports: of others no family can make a model."""
    all_families()  # imports all of them
    package = families.__name__.rpartition(".")[0]
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{package}.")]
    return {value for module in modules for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, LayerConfig)}


def _names(kinds: set[type]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))


class Unsayable(ValueError):
    """Why a family cannot say a config: what differs, in words, and how far away that is: in fields, FOREIGN where the
    family refuses what was written, infinitely where it has no words for it."""

    def __init__(self, lines: list[str], distance: float):
        super().__init__("\n".join(lines))
        self.lines, self.distance = lines, distance


def each(config: Config, kind: type) -> list:
    """All configs of a type, in the order in which they run: `each(config, Attention)` has one entry per layer."""
    if isinstance(config, kind):
        return [config]
    times = config.n if isinstance(config, Repeat) else 1
    return [found for child in config.children().values() for found in each(child, kind)] * times


def settled(config: LanguageModel) -> LanguageModel:
    """One form for configs that compute the same: nothing repeated, nothing nested, sizes written out; and nothing that
    only training asks for."""
    def change(node):
        if isinstance(node, MoE):
            node = dataclasses.replace(node, balance=(), capacity=None, init_scale=1.0)
        if isinstance(node, TopK):
            node = dataclasses.replace(node, jitter=0.0, balance_rate=float(node.balance_rate > 0))
        if isinstance(node, Mamba):
            node = dataclasses.replace(node, dt_rank=node.rank(config.width))
        if isinstance(node, RGLRU):
            node = dataclasses.replace(node, channels=node.channels or config.width, init="code")
        if hasattr(node, "form"):  # of a recurrence: how, not what
            node = dataclasses.replace(node, form=None)
        if isinstance(node, Repeat):
            node = Sequence(*[node.unit] * node.n)
        if isinstance(node, Sequence):
            flat = [layer.layers if isinstance(layer, Sequence) else (layer,) for layer in node.layers]
            return Sequence(*sum(flat, ()))
        if isinstance(node, (Attention, CrossAttention)):
            size = node.head_size or config.width // node.heads
            node = dataclasses.replace(node, kv_heads=node.kv_heads or node.heads, head_size=size,
                                       scale=node.scale or size**-0.5)
            if isinstance(node, Attention) and isinstance(node.positions, Rotary) and node.positions.size == size:
                node = node.set("positions.size", None)
        return node

    return config.map(change)


def _differences(config, other, path: str = "model") -> Iterator[str]:
    """Where two configs differ, in words."""
    if type(config) is not type(other) or not isinstance(config, (Config, tuple)):
        if config != other:
            yield f"{path} is {config!r}; it could say {other!r}"
    elif isinstance(config, tuple):
        if len(config) != len(other):
            yield f"{path} has {len(config)} entries; it could say {len(other)}"
        for i, (a, b) in enumerate(zip(config, other)):
            yield from _differences(a, b, f"{path}.{i}")
    else:
        for field in dataclasses.fields(config):
            pair = getattr(config, field.name), getattr(other, field.name)
            yield from _differences(*pair, f"{path}.{field.name}")
