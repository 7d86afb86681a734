"""Where a parameter lies in a folder's tensors. It follows from the parameter's letters, never from its name.

A torch Linear of ours "D->HK", [D, H, K], is stored as [H K, D]: outputs first, the letters of each side flattened into
one dimension. Tables ("V->D") and what has no inputs ("->HK", a bias, as [H K]) are stored in our order, and so is
everything of GPT-2's Conv1D. Several parameters may share one tensor, along their outputs.
"""

import dataclasses
import itertools
import math
import re
from typing import NamedTuple

import numpy as np
from flax import nnx

from archlab.hub.tensors import Box

Window = tuple[tuple[int, int], ...]  # a part of a parameter: (start, stop) of each axis


@dataclasses.dataclass(frozen=True)
class Fused:
    """The name of a tensor that holds several parameters, group by group of heads: [G, H/G + 2, K] for queries, keys
    and values (GPT-NeoX, BLOOM: G = H; Falcon). Without it they lie one after another (GPT-2, Phi 3)."""

    name: str


@dataclasses.dataclass(frozen=True)
class Apart:
    """The name of a tensor whose letters are dimensions of their own: gains of each head as [H, K] (Cohere)."""

    name: str


@dataclasses.dataclass(frozen=True)
class Row:
    """The name of a tensor with one dimension more in front, of size one (BART's bias of the head, [1, V])."""

    name: str


@dataclasses.dataclass(frozen=True)
class Depthwise:
    """The name of a depthwise convolution's weight: ours is [W, F], torch's [F, 1, W] (Mamba, RecurrentGemma)."""

    name: str


@dataclasses.dataclass(frozen=True)
class Vector:
    """The name of a vector with two dimensions more in front, each of size one (RWKV's mixtures, [1, 1, D])."""

    name: str


@dataclasses.dataclass(frozen=True)
class InputsFirst:
    """The name of a tensor that is stored in our order, as with `Blocks.inputs_first`: experts as [E, D, F] (Llama 4,
    gpt-oss)."""

    name: str


@dataclasses.dataclass(frozen=True)
class Interleaved(InputsFirst):
    """... in which several parameters of experts take turns along the outputs: gate, up, gate, up (gpt-oss)."""


@dataclasses.dataclass(frozen=True)
class Joined:
    """The name of a matrix of all experts, one below another, hidden units first whether they are inputs or outputs:
    [E F, D] (DBRX)."""

    name: str


class Rule(NamedTuple):
    """Our parameters (one, or those that share a tensor), the tensor, and how it is written in the table: as a str, or
    as one of the forms above."""

    ours: tuple[str, ...]
    name: str
    form: type


class Part(NamedTuple):
    """A parameter's share of a tensor.

    path, shape: the parameter's. at: {axis: place} of the copy that this is. groups: for each dimension of the tensor,
    the axes of the parameter that are flattened into it. boxes: pairs of boxes in the dimensions of the tensor: where
    in the parameter as so flattened, and where in the tensor.
    """

    path: str
    shape: tuple[int, ...]
    at: dict[int, int]
    groups: tuple[tuple[int, ...], ...]
    boxes: tuple[tuple[Box, Box], ...]


def rules(table: dict) -> list[Rule]:
    """The rules of a table {our paths: their name}.

    Braces with commas are as in a shell: "layer/{query,key}": "self_attn.{q,k}_proj.weight" is two rules. Where only
    our side has several, they share the tensor. A value may be a tuple of names: the first that suits the parameter's
    letters is taken (`suits`). Other braces stay: {i} is the layer, {e}, {h} the place along the axis E or H.
    """
    found = []
    for ours, values in table.items():
        for value in values if isinstance(values, tuple) else (values,):
            paths, names = expand(ours), expand(value if isinstance(value, str) else value.name)
            if len(names) == 1:
                found.append(Rule(tuple(paths), names[0], type(value)))
            elif len(names) == len(paths):
                found += [Rule((path,), name, type(value)) for path, name in zip(paths, names)]
            else:
                raise ValueError(f"{ours!r} names {len(paths)} parameters, {value!r} {len(names)} tensors")
    return found


def expand(text: str) -> list[str]:
    """"a{b,c}{,d}" gives ab, abd, ac, acd."""
    pieces = re.split(r"\{([^{}]*,[^{}]*)\}", text)
    return ["".join(words) for words in itertools.product(*(piece.split(",") if i % 2 else [piece]
                                                            for i, piece in enumerate(pieces)))]


def enumerated(name: str) -> list[str]:
    """The letters whose places a name spells out: "experts.{e}.w1" gives ["E"]."""
    return [letter.upper() for letter in re.findall(r"\{([a-z])\}", name) if letter != "i"]


def suits(rule: Rule, parameter: nnx.Param) -> bool:
    """Whether the parameter has the axes that the rule's name spells out."""
    return set(enumerated(rule.name)) <= set(parameter.letters)


def place(rule: Rule, parameters: dict[str, nnx.Param], at: dict[int, int], inputs_first: bool):
    """Yields (name, shape, parts): the tensors of a rule, and what lies where in them.

    Args: parameters: those of `rule.ours` by path; at: {axis: place} of the copy that this is about.
    """
    if rule.form is Joined:
        yield _joined(rule, parameters, at)
        return
    first, inputs_first = parameters[rule.ours[0]], inputs_first or issubclass(rule.form, InputsFirst)
    axes = {letter: first.letters.replace("->", "").index(letter) for letter in enumerated(rule.name)}
    for places in itertools.product(*(range(first.shape[axis]) for axis in axes.values())):
        here = at | dict(zip(axes.values(), places))
        name = rule.name
        for letter, n in zip(axes, places):
            name = name.replace(f"{{{letter.lower()}}}", str(n))
        flat = [_flatten(parameters[path], here, inputs_first, rule.form) for path in rule.ours]
        dimension = flat[0].outputs  # along which parameters share a tensor
        sizes = [f.shape[dimension] for f in flat]
        shape = list(flat[0].shape)
        shape[dimension] = sum(sizes)
        cuts = min(f.heads for f in flat) if rule.form is Fused else 1
        parts = []
        for i, (path, f) in enumerate(zip(rule.ours, flat)):
            size, whole, before = sizes[i] // cuts, sum(sizes) // cuts, sum(sizes[:i]) // cuts
            boxes = tuple((_box(f.shape, dimension, g * size, size), _box(f.shape, dimension, g * whole + before, size))
                          for g in range(cuts))
            if rule.form is Interleaved:
                boxes = ((boxes[0][0], _box(f.shape, dimension, i, size, len(flat))),)
            parts.append(Part(path, parameters[path].shape, here, f.groups, boxes))
        yield name, tuple(shape), parts


def _joined(rule: Rule, parameters: dict[str, nnx.Param], at: dict[int, int]):
    """The tensor of a `Joined` rule: what would be tensors of their own, one below another."""
    inputs_first = "F" in parameters[rule.ours[0]].letters.split("->")[0]
    apart = list(place(Rule(rule.ours, rule.name + "{e}", str), parameters, at, inputs_first))
    rows, *rest = apart[0][1]
    parts = [part._replace(boxes=((ours, (slice(e * rows, (e + 1) * rows), *theirs[1:])),))
             for e, (_, _, (part,)) in enumerate(apart) for ours, theirs in part.boxes]
    return rule.name, (len(apart) * rows, *rest), parts


class _Flat(NamedTuple):
    groups: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    outputs: int  # the dimension that holds the outputs
    heads: int  # the size of the first letter of the outputs


def _flatten(parameter: nnx.Param, at: dict[int, int], inputs_first: bool, form: type) -> _Flat:
    before, after = parameter.letters.split("->")
    axes = lambda letters, start: [(letter, start + i) for i, letter in enumerate(letters) if start + i not in at]
    ins, outs = axes(before, 0), axes(after, len(before))
    stacked = [(axis,) for letter, axis in ins if letter in "LE"]  # experts in one tensor come first
    stacked += [()] * ((form is Row) + 2 * (form is Vector))
    ins = [pair for pair in ins if pair[0] not in "LE"]
    ins, outs = (_merge(side, form is Apart) for side in (ins, outs))
    ours = inputs_first or "V" in before or not ins
    groups = tuple(stacked) + (ins + outs if ours else outs + ins)
    if form is Depthwise:
        (taps,), (channels,) = groups
        groups = ((channels,), (), (taps,))
    outputs = len(stacked) + (len(ins) if ours else 0)
    heads = parameter.shape[outs[0][0]] if outs else 1
    return _Flat(groups, tuple(math.prod(parameter.shape[axis] for axis in group) for group in groups), outputs, heads)


def _merge(axes: list[tuple[str, int]], apart: bool) -> tuple[tuple[int, ...], ...]:
    """The letters of one side are one dimension of a tensor, but for "." and where they are wanted apart."""
    if apart or any(letter == "." for letter, _ in axes):
        return tuple((axis,) for _, axis in axes)
    return (tuple(axis for _, axis in axes),) if axes else ()


def _box(shape, dimension: int, start: int, size: int, step: int | None = None) -> Box:
    return tuple(_run(start, size, step) if d == dimension else slice(0, n) for d, n in enumerate(shape))


def _run(start: int, size: int, step: int | None) -> slice:
    """`size` places from `start` on, `step` apart."""
    return slice(start, start + (size - 1) * (step or 1) + 1, step)


def flattened(array: np.ndarray, part: Part) -> np.ndarray:
    """The copy of a parameter that `part` is about, in the dimensions of the tensor: a view where the array is
    contiguous, for the axes of a group follow one another."""
    copy = array[tuple(part.at.get(axis, slice(None)) for axis in range(array.ndim))]
    kept = [axis for axis in range(array.ndim) if axis not in part.at]
    order = [kept.index(axis) for group in part.groups for axis in group]
    shape = [math.prod(array.shape[axis] for axis in group) for group in part.groups]
    return copy.transpose(order).reshape(shape)


def whole(path: str, shape: tuple[int, ...]) -> Part:
    """A parameter that is a tensor of its own and lies in it as it is."""
    everything = tuple(slice(0, n) for n in shape)
    return Part(path, shape, {}, tuple((axis,) for axis in range(len(shape))), ((everything, everything),))


def divisible(part: Part, window: Window) -> bool:
    """Whether a window of the parameter is a window of the tensor: only the first axis of a group may be cut."""
    return all(window[axis] == (0, part.shape[axis]) for group in part.groups for axis in group[1:])


def within(part: Part, window: Window) -> list[tuple[Box, Box]]:
    """`part.boxes` cut to a window of the parameter, ours counted from the window's corner; none where the copy lies
    outside."""
    if any(not window[axis][0] <= n < window[axis][1] for axis, n in part.at.items()):
        return []
    bounds = []  # of the window, in the dimensions of the tensor
    for group in part.groups:
        rest = math.prod(part.shape[axis] for axis in group[1:])
        bounds.append(tuple(rest * n for n in window[group[0]]) if group else (0, 1))
    cut = []
    for ours, theirs in part.boxes:
        edges = [(max(o.start, low), min(o.stop, high)) for o, (low, high) in zip(ours, bounds)]
        if all(start < stop for start, stop in edges):
            local = tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(edges, bounds))
            there = tuple(_run(t.start + (start - o.start) * (t.step or 1), stop - start, t.step)
                          for (start, stop), o, t in zip(edges, ours, theirs))
            cut.append((local, there))
    return cut
