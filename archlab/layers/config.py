"""Configs: an architecture is a tree of frozen dataclasses, and this is everything such a tree can do.

A config is validated when it is made, printed by `repr`, changed by `dataclasses.replace` or by a path
(`config.set("body.unit.layers.0.layer.heads", 4)`), written to JSON and read back. Reading JSON imports nothing and
runs nothing: type names are looked up among the config classes that are already imported.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import types
import typing
from typing import Any, Self

import flax.nnx as nnx

_classes: dict[str, type["Config"]] = {}


class Config:
    """Base of all configs. Subclasses are made frozen dataclasses by the act of subclassing; their fields are checked
    against their annotations before `__post_init__`."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("__post_init__", lambda self: None)

        @functools.wraps(own)
        def checked(self):
            check_kinds(self)
            own(self)

        if "__post_init__" in cls.__dict__ or not hasattr(cls, "__post_init__"):
            cls.__post_init__ = checked
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
        """A copy with the field at `path` replaced; a string value is read as a Python literal or as a config, such as
        "TopK(2, scale=2.5)", where it is one."""
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
    def looks_ahead(self) -> bool:
        """Whether in the training form an output may depend on a later token."""
        return any(layer.looks_ahead for layer in self.inner())

    @property
    def longest(self) -> int | None:
        """The longest text that it has places for, in tokens; None for any."""
        return min((n for n in (layer.longest for layer in self.inner()) if n is not None), default=None)


def require(condition: bool, config: Config, field: str, wanted: str) -> None:
    """Raises ValueError naming the config, the field, its value and what would be right."""
    if not condition:
        raise ValueError(f"{type(config).__name__}.{field} = {getattr(config, field)!r}: {wanted}")


KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", types.NoneType: "None"}


def check_kinds(config: Config) -> None:
    """Raises ValueError for the first field whose value is not of the kind that its annotation says."""
    for name, kind in _annotations(type(config)).items():
        value = getattr(config, name)
        if not _is_kind(value, kind):
            raise ValueError(f"{type(config).__name__}.{name} = {value!r}: must be {_words(kind)}")


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    """{field: annotation}; none of a class whose annotations cannot be resolved."""
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError):
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _is_union(kind) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _words(kind) -> str:
    """What a value of this kind is, for an error message: "a tuple (a number, a number) or None"."""
    if _is_union(kind):
        return " or ".join(map(_words, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"a tuple ({', '.join('...' if k is ... else _words(k) for k in typing.get_args(kind))})"
    return KINDS.get(kind) or f"a {getattr(typing.get_origin(kind) or kind, '__name__', kind)}"


def _is_kind(value, kind) -> bool:
    if _is_union(kind):
        return any(_is_kind(value, option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple and isinstance(value, tuple):
        kinds = typing.get_args(kind)
        if kinds[-1] is ...:
            kinds = kinds[:1] * len(value)
        return len(value) == len(kinds) and all(map(_is_kind, value, kinds))
    if kind is float or kind is int:
        number = not isinstance(value, bool) and hasattr(value, "__float__")
        return number and (kind is float or hasattr(value, "__index__"))
    kind = typing.get_origin(kind) or kind
    return not isinstance(kind, type) or isinstance(value, kind)


def near(name: str, names) -> str:
    """Words for an error message: the nearest of `names`, or all of them."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"


def from_json(text: str) -> Config:
    """The config tree that `Config.to_json` wrote. ValueError for an unknown type or field; nothing is imported."""
    return _decode(json.loads(text))


def _literal(value):
    """What a text stands for: a Python literal, a config such as "TopK(2, scale=2.5)", or else itself."""
    if not isinstance(value, str):
        return value
    try:
        return _evaluate(ast.parse(value.strip(), mode="eval").body)
    except (SyntaxError, _NoLiteral):
        return value


class _NoLiteral(Exception):
    """A text that stands for itself."""


def _evaluate(node):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id not in _classes:
            known = near(node.func.id, sorted(_classes))
            raise ValueError(f"no config class named {node.func.id!r} is imported; {known}")
        fields = {str(word.arg): _evaluate(word.value) for word in node.keywords}
        return _make(_classes[node.func.id], *map(_evaluate, node.args), **fields)
    if isinstance(node, ast.Tuple):
        return tuple(map(_evaluate, node.elts))
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _NoLiteral from None


def _make(cls: type[Config], *values, **fields) -> Config:
    """`cls(*values, **fields)`; ValueError where it has no such fields, or not all that it must have are given."""
    names = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in names:
            raise ValueError(f"{cls.__name__} has no field {name!r}; {near(name, names or ['none'])}")
    try:
        inspect.signature(cls).bind(*values, **fields)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}; its fields are {', '.join(names) or 'none'}") from None
    return cls(*values, **fields)


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
    return _make(_classes[name], **{key: _decode(v) for key, v in value.items() if key != "type"})
