"""Collapse: experts that the router has stopped choosing learn nothing any more, and so are not chosen again (Shazeer
et al. 2017, arXiv:1701.06538, section 4)."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

SHARE = 0.1  # of its fair share, the mean over the experts of its layer: with less an expert starves


class Collapse(NamedTuple):
    """Experts of one layer that began to starve together. layer: its number among those with experts, from 1; path: as
    `per_layer` has it; experts: from 0; since, steps: the first step and how many they have been."""

    layer: int
    path: str
    experts: list[int]
    since: int
    steps: int

    def __str__(self) -> str:
        names = f"expert{'s' if len(self.experts) > 1 else ''} {', '.join(map(str, self.experts))}"
        return (f"layer {self.layer} ({self.path}), {names}: under {SHARE:.0%} of the fair share of tokens for "
                f"{self.steps} steps, since step {self.since}")


@dataclasses.dataclass
class Watch:
    """Tells of each expert that has starved for `steps` steps running; again only after it has recovered.

    since: {path of a layer: for each expert the step in which it began to starve, 0 where it does not}: all that a
    watch remembers. One that is given what another remembered goes on from there.
    """

    steps: int = 100
    since: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def look(self, step: int, loads: Mapping[str, np.ndarray]) -> list[Collapse]:
        """Takes the loads [E] of all layers, by path and in order, in a step; returns what must be told now."""
        told = []
        for layer, (path, load) in enumerate(loads.items(), 1):
            starves = load < SHARE * load.mean()
            before = self.since.get(path, np.zeros(len(load), np.int64))
            since = self.since[path] = np.where(starves, np.where(before > 0, before, step), 0)
            for first in np.unique(since[starves & (step - since + 1 == self.steps)]):
                told.append(Collapse(layer, path, np.flatnonzero(since == first).tolist(), int(first), self.steps))
        return told
