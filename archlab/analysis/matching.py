"""Models of equal size: the width of an architecture is changed until what is measured comes to a target."""

import dataclasses
from collections.abc import Callable

from archlab.analysis.accounts import count_parameters
from archlab.layers.config import Config
from archlab.model import LanguageModel

TOLERANCE = 0.03
SCALED = ("hidden", "head_size", "rank", "dt_rank")  # fields counted in channels: they grow with the width
LIMIT = 64  # how many times narrower or wider than the given model is looked for
REACH = 512  # how far a valid width may lie from the one wanted


def active_body(config: LanguageModel) -> int:
    """The usual measure: parameters that a token meets, without the tables over the vocabulary."""
    return count_parameters(config).active_body


def match(config: LanguageModel, target: float,
          measure: Callable[[LanguageModel], float] = active_body) -> LanguageModel:
    """The same architecture at the width where `measure` is within 3% of `target`.

    The fields of `SCALED` that hold a number grow in proportion to the width; the numbers of layers, heads and experts
    stay. Widths that the architecture refuses (heads that do not divide them) are passed over; where those it takes
    lie too far apart, the hidden sizes of its MLPs and experts make up for the rest.

    Args: config: any language model; target: in units of the measure, which must grow with the width.
    Raises: ValueError naming the nearest that was reached, where nothing comes within 3%.
    """
    if target <= 0:
        raise ValueError(f"match: target = {target!r}: must be positive")
    tried: dict[LanguageModel, float] = {}

    def error(candidate: LanguageModel) -> float:
        """How far a candidate is from the target, as a signed share of it."""
        if candidate not in tried:
            tried[candidate] = measure(candidate) / target - 1
        return tried[candidate]

    def nearest() -> LanguageModel:
        return min(tried, key=lambda candidate: abs(tried[candidate]))

    if abs(error(config)) <= TOLERANCE:
        return config
    widths = lambda width: _valid(config, width)
    _search(widths, config.width, config.width / LIMIT, config.width * LIMIT, error)
    if abs(error(nearest())) > TOLERANCE:
        base = nearest()
        hidden = [c.hidden for _, c in base.walk() if type(getattr(c, "hidden", None)) is int]
        if hidden:
            largest = max(hidden)  # the search counts in units of the largest hidden size; the others keep their ratio
            sizes = lambda size: _scale(base, size / largest, ("hidden",))
            _search(sizes, largest, largest / 4, largest * 4, error)
    if abs(error(nearest())) > TOLERANCE:
        best = nearest()
        raise ValueError(f"no width of this architecture comes within {TOLERANCE:.0%} of {target:,.0f}: the nearest is "
                         f"{(1 + tried[best]) * target:,.0f} at width {best.width}")
    return nearest()


def scaled(config: LanguageModel, width: int, names: tuple[str, ...] = SCALED) -> LanguageModel:
    """The architecture at another width; the whole numbers in the fields of `names` grow with it. ValueError where its
    layers do not allow that."""
    return _scale(config, width / config.width, names, width=width)


def _search(make, start: float, low: float, high: float, error) -> None:
    """Halves the interval between a size that measures too little and one that measures too much.

    `make(size)` gives a candidate, or one of a size near by, or None where it finds none.
    """
    low, high = max(1, round(low)), round(high)
    size = round(start)
    while low <= high:
        candidate = make(size)
        if candidate is None:
            return
        distance = error(candidate)
        if abs(distance) <= TOLERANCE / 10:
            return
        low, high = (size + 1, high) if distance < 0 else (low, size - 1)
        guess = size * max(1 + distance, 1e-6) ** -0.5  # most of what is measured grows with the square of the size
        size = round(guess) if low < guess < high else (low + high) // 2


def _valid(config: LanguageModel, width: int) -> LanguageModel | None:
    """The architecture at the valid width nearest to `width`, or None where none is near."""
    for step in range(min(width, REACH)):
        for candidate in (width - step, width + step):
            try:
                return scaled(config, candidate)
            except ValueError:
                continue
    return None


def _scale(config: LanguageModel, factor: float, names: tuple[str, ...], **fields) -> LanguageModel:
    """The config with every whole number in a field of `names` multiplied (kept a multiple of 8 where large), and
    `fields` of the language model replaced in the same breath: a width is checked against the layers it comes with."""
    def size(number: int) -> int:
        wanted = number * factor
        return 8 * round(wanted / 8) if wanted >= 256 else max(1, round(wanted))

    def change(c: Config) -> Config:
        scaled = {f.name: size(getattr(c, f.name)) for f in dataclasses.fields(c)
                  if f.name in names and type(getattr(c, f.name)) is int}
        return dataclasses.replace(c, **scaled) if scaled else c

    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    parts = {name: part.map(change) for name, part in parts.items() if isinstance(part, Config)}
    return dataclasses.replace(config, **parts, **fields)
