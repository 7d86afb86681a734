"""Which tensors hold which parameters: the tables of a family, applied to one model."""

import fnmatch
from typing import NamedTuple

import jax.numpy as jnp

from archlab.hub.family import Blocks, Family
from archlab.hub.layout import Part, Rule, place, rules, suits
from archlab.hub.tensors import Tensors
from archlab.layers.config import LayerConfig
from archlab.layers.repeat import Repeat
from archlab.layers.sequence import Sequence

BUFFERS = ("*rotary_emb.inv_freq", "*.masked_bias")  # no parameters, in any family


class Stored(NamedTuple):
    """A tensor of a folder: its shape, and the parameters that lie in it."""

    shape: tuple[int, ...]
    parts: list[Part]


def plan(family: Family, config, parameters: dict) -> dict[str, Stored]:
    """{name of a tensor: `Stored`} for all parameters of a model.

    Args: config: as `family.config` made it. parameters: `parameters_of` its model, which may be abstract.
    Raises: ValueError listing the parameters for which the family has no rule.
    """
    found: dict[str, Stored] = {}
    done: set[str] = set()

    def apply(table: list[Rule], path="", prefix="", copy=None, inputs_first=False):
        for rule in table:
            ours = tuple(path + name for name in rule.ours)
            if not all(name in parameters and suits(rule, parameters[name]) for name in ours):
                continue  # the table knows of more than this model has
            rule = Rule(ours, prefix + rule.name, rule.form)
            for name, shape, parts in place(rule, parameters, {} if copy is None else {0: copy}, inputs_first):
                found[name] = Stored(shape, parts)
            done.update(ours)

    apply(rules(family.outer))
    for blocks in family.blocks:
        table = rules(blocks.names)
        for i, (path, copy) in enumerate(block_places(config, family, blocks)):
            apply(table, f"{path}/", blocks.prefix.replace("{i}", str(i)), copy, blocks.inputs_first)
    if left := [path for path in parameters if path not in done]:
        raise ValueError(f"the family {family.model_types[0]} does not say where these lie: {left}")
    return found


def block_places(config, family: Family, blocks: Blocks) -> list[tuple[str, int | None]]:
    """For each block where it is: its module's path, and which copy of a `Repeat` (None outside one)."""
    found = []
    for i, child in enumerate(getattr(config, blocks.body).layers):
        path = f"{blocks.body}/layers/{i}"
        if isinstance(child, Repeat):  # of a `Sequence` of blocks, as `stack` makes it
            found += [(f"{path}/unit/layers/{j}", copy) for copy in range(child.n) for j in range(len(child.unit.layers))]
        elif not any(name.startswith(f"{path}/") for name in family.outer):
            found.append((path, None))
    return found


def leaves(config: LayerConfig, path: str, copy: int | None = None) -> list[tuple[str, int | None]]:
    """Path and copy of every layer of a body that is neither `Sequence` nor `Repeat`, in the order in which they run:
    bodies that do the same have the same list but for the paths."""
    if isinstance(config, Sequence):
        return [leaf for i, layer in enumerate(config.layers) for leaf in leaves(layer, f"{path}/layers/{i}", copy)]
    if isinstance(config, Repeat):
        return [leaf for n in range(config.n) for leaf in leaves(config.unit, f"{path}/unit", n)]
    return [(path, copy)]


def compare(wanted: dict[str, Stored], tensors: Tensors, family: Family, optional: set[str]) -> dict[str, str]:
    """{name in `wanted`: name in the folder}.

    Args: optional: names that may be there and are not needed.
    Raises: ValueError listing tensors that are missing, not expected, misshapen, or no floating-point numbers.
    """
    names, lines = {}, []
    for name, stored in wanted.items():
        bare = name.removeprefix(family.base)
        names[name] = name if name in tensors.found else bare
        tensor = tensors.found.get(names[name])
        if tensor is None:
            lines.append(f"missing: {name} {list(stored.shape)}")
        elif tensor.dtype is None or not jnp.issubdtype(tensor.dtype, jnp.floating):
            lines.append(f"{name} holds no floating-point numbers")
        elif tensor.shape != stored.shape:
            lines.append(f"{name} is {list(tensor.shape)}, must be {list(stored.shape)}")
    known = set(names.values()) | optional
    unneeded = lambda name: any(fnmatch.fnmatchcase(f".{name}", pattern) for pattern in BUFFERS + family.buffers)
    lines += [f"not expected: {name} {list(tensors.found[name].shape)}" for name in tensors.found
              if name not in known and not unneeded(name)]
    if lines:
        raise ValueError("the tensors are not those of config.json:\n  " + "\n  ".join(lines))
    return names
