"""Which tensors hold which parameters: the tables of a family, applied to one model."""

import fnmatch
from typing import NamedTuple

import jax.numpy as jnp

from archlab.hub.family import Blocks, Family
from archlab.hub.layout import Part, Rule, expand, place, rules, suits
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

    Args: config: as `family.config` made it. parameters: what is `lettered` of its model, which may be abstract.
    Raises: ValueError listing the parameters for which the family has no rule.
    """
    found: dict[str, Stored] = {}
    done: set[str] = set()

    def apply(table: list[Rule], path="", prefix="", copy=None, inputs_first=False):
        placed: set[str] = set()
        for rule in table:
            ours = tuple(path + name for name in rule.ours)
            if not all(name in parameters and suits(rule, parameters[name]) for name in ours) or placed & set(ours):
                continue  # the table knows of more than this model has, and the first rule that suits is taken
            placed.update(ours)
            rule = Rule(ours, prefix + rule.name, rule.form)
            for name, shape, parts in place(rule, parameters, {} if copy is None else {0: copy}, inputs_first):
                found[name] = Stored(shape, parts)
            done.update(ours)

    apply(rules(family.outer))
    for blocks in family.blocks:
        table = rules(blocks.names(config) if callable(blocks.names) else blocks.names)
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
            unit = [f"{path}/unit/layers/{j}" for j in range(len(child.unit.layers))]
            found += [(block, copy) for copy in range(child.n) for block in unit]
        elif not any(name.startswith(f"{path}/") for names in family.outer for name in expand(names)):
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


def find(name: str, tensors: Tensors, family: Family) -> str | None:
    """What a tensor is called in the folder; None where it is not there."""
    names = name, name.removeprefix(family.base), family.inside + name
    return next((found for found in names if found in tensors.found), None)


def has_own_head(tensors: Tensors, family: Family) -> bool:
    """Whether the head is there and differs from the embedding: such a model is not tied, whatever config.json says
    (transformers keeps both too; the T5 of its version 5 are all called tied)."""
    table, head = (find(family.outer[path], tensors, family) for path in ("embed/table", "head/weight"))
    return table is not None and head is not None and not tensors.same(table, head)


def compare(wanted: dict[str, Stored], tensors: Tensors, family: Family, config) -> dict[str, str]:
    """{name in `wanted`: name in the folder}, without those of `family.zeros` that are not there.

    Args: config: the model's; if it is tied, the embedding may be there under its name, the head's, or both.
    Raises: ValueError listing tensors that are missing, not expected, misshapen, or no floating-point numbers.
    """
    names, lines = {}, []
    table, head = family.outer["embed/table"], family.outer["head/weight"]
    copies = family.copies + ((head,) if config.tied else ())
    copies = sorted({find(name, tensors, family) for name in copies} - {None})
    for name, stored in wanted.items():
        found = find(name, tensors, family) or (copies[0] if copies and name == table else None)
        if found is None and name in family.zeros:
            continue
        names[name], tensor = found, tensors.found.get(found)
        if tensor is None:
            lines.append(f"missing: {name} {list(stored.shape)}")
        elif tensor.dtype is None or not jnp.issubdtype(tensor.dtype, jnp.floating):
            lines.append(f"{name} holds {tensor.kind}, which are no floating-point numbers that can be read")
        elif tensor.shape != stored.shape:
            lines.append(f"{name} is {list(tensor.shape)}, must be {list(stored.shape)}")
    lines += [f"{name} differs from {names[table]}: a model has one embedding" for name in copies
              if names[table] in tensors.found and not tensors.same(name, names[table])]
    known = {*names.values(), *copies}
    buffers = BUFFERS + (family.buffers(config) if callable(family.buffers) else family.buffers)
    unneeded = lambda name: any(fnmatch.fnmatchcase(f".{name}", pattern) for pattern in buffers)
    lines += [f"not expected: {name} {list(tensors.found[name].shape)}" for name in tensors.found
              if name not in known and not unneeded(name)]
    if lines:
        raise ValueError("the tensors are not those of config.json:\n  " + "\n  ".join(lines))
    return names
