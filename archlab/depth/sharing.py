"""Which weights each layer of a deep stack uses: the sharing patterns of recursive transformers, as expressions.

Bae et al. 2025, Mixture-of-Recursions (arXiv:2507.10524), section 2.1 and table 1. Of 9 layers in 3 recursions, with
weights numbered from 0 (middle patterns: of 8):

    cycle            0 1 2 0 1 2 0 1 2        middle_cycle       0 1 2 1 2 1 2 3
    sequence         0 0 0 1 1 1 2 2 2        middle_sequence    0 1 1 1 2 2 2 3

What `cycle` recurs, `MixtureOfRecursions(Repeat(block, 3), 3)` recurs for a share of the tokens.
"""

from archlab.depth.recur import Recur
from archlab.layers.config import LayerConfig
from archlab.layers.repeat import Repeat
from archlab.layers.sequence import Sequence


def cycle(block: LayerConfig, layers: int, recursions: int) -> LayerConfig:
    """A whole stack, again and again: layer l has the weights of `l mod (layers / recursions)`."""
    return _cycle(block, _unique("cycle", layers, layers, recursions), recursions)


def sequence(block: LayerConfig, layers: int, recursions: int) -> LayerConfig:
    """Each layer again before the next one: layer l has the weights of `floor(l / recursions)`."""
    return _sequence(block, _unique("sequence", layers, layers, recursions), recursions)


def middle_cycle(block: LayerConfig, layers: int, recursions: int) -> LayerConfig:
    """`cycle` of all but the first and the last layer, which have weights of their own."""
    unique = _unique("middle_cycle", layers, layers - 2, recursions)
    return Sequence(block, _cycle(block, unique, recursions), block)


def middle_sequence(block: LayerConfig, layers: int, recursions: int) -> LayerConfig:
    """`sequence` of all but the first and the last layer, which have weights of their own."""
    unique = _unique("middle_sequence", layers, layers - 2, recursions)
    return Sequence(block, _sequence(block, unique, recursions), block)


def _cycle(block: LayerConfig, unique: int, recursions: int) -> LayerConfig:
    return Recur(_copies(block, unique), recursions)


def _sequence(block: LayerConfig, unique: int, recursions: int) -> LayerConfig:
    return _copies(Recur(block, recursions), unique)


def _copies(unit: LayerConfig, n: int) -> LayerConfig:
    return unit if n == 1 else Repeat(unit, n)


def _unique(pattern: str, layers: int, shared: int, recursions: int) -> int:
    """How many of the layers that share weights differ. ValueError where recursions do not divide them."""
    if recursions < 1 or shared < 1 or shared % recursions:
        of = f"{layers} layers" if shared == layers else f"{layers} layers, of which {shared} share weights,"
        raise ValueError(f"{pattern}: {of} in {recursions} recursions: recursions must divide the layers that share, "
                         "and there must be one of each at least")
    return shared // recursions
