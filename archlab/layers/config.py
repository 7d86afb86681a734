"""Configs: an architecture is a tree of frozen dataclasses, and this is everything such a tree can do.

A config is validated when it is made, printed by `repr`, changed by `dataclasses.replace` or by a path
(`config.set("body.unit.layers.0.layer.heads", 4)`), written to JSON and read back. Reading JSON imports nothing and
runs nothing: type names are looked up among the config classes that are already imported.
"""

import ast
import dataclasses
import difflib
import json
from typing import Any, Self

import flax.nnx as nnx

_classes: dict[str, type["Config"]] = {}


class Config:
    """Base of all configs. Subclasses are made frozen dataclasses by the act of subclassing."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True)(cls)
        known = _classes.get(cls.__name__)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"a config class named {cls.__name__} exists already, in {known.__module__}: checkpoints "
                             "name classes, so give yours a name of its own")
        _classes[cls.__name__] = cls

    def children(self) -> dict[str, "Config"]:
        """The configs directly inside this one, by path: a tuple `layers` gives `layers.0`, `layers.1`, ..."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Config):
                found[field.name] = value
            elif isinstance(value, tuple):
                found.update({f"{field.name}.{i}": v for i, v in enumerate(value) if isinstance(v, Config)})
        return found

    def walk(self, path: str = ""):
        """Yields (path, config) for this config and all below it."""
        yield path, self
        for name, child in self.children().items():
            yield from child.walk(f"{path}.{name}" if path else name)

    def map(self, change) -> Self:
        """A copy with `change(config)` in place of every config of the tree, leaves first."""
        def of(value):
            if isinstance(value, tuple):
                return tuple(of(v) for v in value)
            return value.map(change) if isinstance(value, Config) else value

        fields = {field.name: of(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return change(dataclasses.replace(self, **fields))

    def set(self, path: str, value: Any) -> Self:
        """A copy with the field at `path` replaced; a string value is read as a Python literal where it is one."""
        name, _, rest = path.partition(".")
        names = [field.name for field in dataclasses.fields(self)]
        if name not in names:
            raise ValueError(f"{type(self).__name__} has no field {name!r}; {near(name, names)}")
        old = getattr(self, name)
        if rest and isinstance(old, tuple):
            index, _, deeper = rest.partition(".")
            if not index.isdigit() or int(index) >= len(old):
                raise ValueError(f"{type(self).__name__}.{name} has places 0 to {len(old) - 1}, not {index!r}")
            new = old[int(index)].set(deeper, value) if deeper else _literal(value)
            return dataclasses.replace(self, **{name: old[: int(index)] + (new,) + old[int(index) + 1 :]})
        if rest and isinstance(old, Config):
            return dataclasses.replace(self, **{name: old.set(rest, value)})
        if rest:
            raise ValueError(f"{type(self).__name__}.{name} is {old!r}: it has no field {rest!r}")
        new = _literal(value)
        if isinstance(old, (int, float)) and isinstance(new, str):
            raise ValueError(f"{type(self).__name__}.{name} = {new!r}: must be a number, as {old} is")
        return dataclasses.replace(self, **{name: new})

    def to_json(self) -> str:
        """The whole tree as JSON text."""
        return json.dumps(_encode(self), indent=1)


class LayerConfig(Config):
    """The config of a layer: it knows how to build its module, and what it may promise."""

    def build(self, rngs: nnx.Rngs, at) -> nnx.Module:
        """The module, at a `Place`; random numbers come from `rngs`."""
        raise TypeError(f"{type(self).__name__} does not say how it is built")

    def check(self, width: int) -> None:
        """Raises ValueError where this layer cannot stand in a stream of `width` channels."""
        for layer in self.inner():
            layer.check(width)

    def inner(self) -> list["LayerConfig"]:
        """The layers directly inside this one."""
        return [child for child in self.children().values() if isinstance(child, LayerConfig)]

    @property
    def branches(self) -> int:
        """How many residual branches it runs through: the unit in which depth is counted (`Place.index`)."""
        return sum(layer.branches for layer in self.inner())

    @property
    def causal(self) -> bool:
        """Whether no output depends on a later token (in the deterministic form)."""
        return all(layer.causal for layer in self.inner())

    @property
    def recurrent(self) -> bool:
        """Whether a decode step's work and state are bounded, whatever the length of the context."""
        return all(layer.recurrent for layer in self.inner())

    @property
    def longest(self) -> int | None:
        """The longest text that it has places for, in tokens; None for any."""
        return min((n for n in (layer.longest for layer in self.inner()) if n is not None), default=None)


def require(condition: bool, config: Config, field: str, wanted: str) -> None:
    """Raises ValueError naming the config, the field, its value and what would be right."""
    if not condition:
        raise ValueError(f"{type(config).__name__}.{field} = {getattr(config, field)!r}: {wanted}")


def near(name: str, names) -> str:
    """Words for an error message: the nearest of `names`, or all of them."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"


def from_json(text: str) -> Config:
    """The config tree that `Config.to_json` wrote. ValueError for an unknown type or field; nothing is imported."""
    return _decode(json.loads(text))


def _literal(value):
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _encode(value):
    if isinstance(value, Config):
        fields = {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_encode(v) for v in value]
    return value


def _decode(value):
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if not isinstance(value, dict):
        return value
    name = value.get("type")
    if name not in _classes:
        raise ValueError(f"no config class named {name!r} is imported; if it lives in a file of yours, import that "
                         "file first (the experiments' flag --code=FILE does so)")
    cls, known = _classes[name], {field.name for field in dataclasses.fields(_classes[name])}
    unknown = set(value) - known - {"type"}
    if unknown:
        raise ValueError(f"{name} has no field {sorted(unknown)}; it has {sorted(known)}")
    return cls(**{key: _decode(v) for key, v in value.items() if key != "type"})
