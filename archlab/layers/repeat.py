"""Depth: copies of a unit with weights of their own, and one set of weights used many times.

`Repeat` stacks its copies' weights on a leading axis L, drawn by `vmap` over keys. It runs them by `lax.scan` (one
compiled body: short compile times and, with rematerialisation, little memory) or unrolled (no loop: on a CPU the
gradient is 1.2 to 4 times faster). Both give the same numbers.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import reuse, variables_of
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Layer, Place, Tokens
from archlab.layers.low_rank import CorrectedModule
from archlab.layers.sequence import Sequence


class Repeat(LayerConfig):
    """`n` copies of `unit`, one after another, each with its own weights.

    scan: run by `lax.scan` with rematerialised units (True) or unrolled (False); None chooses by platform: unrolled on
    a CPU, scanned elsewhere.
    """

    unit: LayerConfig
    n: int
    scan: bool | None = None

    def __post_init__(self):
        require(self.n >= 1, self, "n", "must be at least 1")

    @property
    def branches(self) -> int:
        return self.n * self.unit.branches

    def build(self, rngs: nnx.Rngs, at: Place) -> "RepeatModule":
        return RepeatModule(self, rngs, at)


class RepeatModule(Layer):
    """`unit` holds the stacked copies, or a list of n modules after `unstack`. State: stacked where scanned, a tuple
    of n where unrolled."""

    def __init__(self, config: Repeat, rngs: nnx.Rngs, at: Place):
        self.n = config.n
        self.scanned = jax.default_backend() != "cpu" if config.scan is None else config.scan
        branches = config.unit.branches

        def make(key, i):
            return config.unit.build(nnx.Rngs(key), at._replace(index=at.index + i * branches))

        stacked = jax.vmap(make)(jax.random.split(rngs.params(), config.n), jnp.arange(config.n))
        self.unit = _relabel(stacked, config.n)

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        states = tuple(unit.init_state(batch, max_length, dtype, memory) for unit in self.units())
        return jax.tree.map(lambda *copies: jnp.stack(copies), *states) if self.scanned else states

    def units(self) -> list[Layer]:
        """The n copies as modules of their own."""
        if isinstance(self.unit, nnx.List):
            return list(self.unit)
        own, shared, structure = _split(self.unit)
        # lax.split, because its gradient is one concatenation; that of n slices is n sums over the whole stack.
        pieces = [jax.lax.split(a, (1,) * self.n, axis=0) for a in jax.tree.leaves(own)]
        copies = [jax.tree.unflatten(jax.tree.structure(own), [p[i][0] for p in pieces]) for i in range(self.n)]
        return [nnx.merge(structure, copy, shared) for copy in copies]

    def __call__(self, x, tokens: Tokens, state=None):
        run = self._scan if self.scanned else self._unroll
        x, state, aux = run(x, tokens, state)
        for path in _shared_paths(self.unit) & set(aux.updates):  # all copies say what one variable shall do
            aux.updates[path] = aux.updates[path].sum(0)
        return x, state, aux.within().under("unit")

    def _unroll(self, x, tokens, state):
        states, said = [], []
        for i, unit in enumerate(self.units()):
            given = dataclasses.replace(tokens.fold(i), last_only=tokens.last_only and i == self.n - 1)
            x, new, aux = unit(x, given, None if state is None else state[i])
            states.append(new)
            said.append(aux)
        return x, None if state is None else tuple(states), jax.tree.map(lambda *copies: jnp.stack(copies), *said)

    def _scan(self, x, tokens, state):
        if isinstance(self.unit, nnx.List):
            raise ValueError("an unstacked model runs unrolled: build it with Repeat.scan = False")
        own, shared, structure = _split(self.unit)
        tokens = dataclasses.replace(tokens, last_only=False)  # all copies run one program

        def body(x, copy):
            weights, i, state = copy
            x, state, aux = nnx.merge(structure, weights, shared)(x, tokens.fold(i), state)
            return x, (state, aux)

        if state is None or tokens.keys is not None:  # it may be training, where keys are shared through states too
            body = jax.checkpoint(body)  # keep only the stream between units; recompute the rest in the backward pass
        x, (state, aux) = jax.lax.scan(body, x, (own, jnp.arange(self.n), state))
        return x, state, aux


class Shared(LayerConfig):
    """One set of weights for every copy that an enclosing `Repeat` makes; a state per call as always.

    `Repeat(Shared(block), 12)` is weight-tied depth (ALBERT, arXiv:1909.11942). lora: the rank of a low-rank
    correction that each copy owns, added to every matrix of `layer` (Zamba2, arXiv:2411.15242; relaxed recursive
    transformers, arXiv:2410.20672); 0 for none. It starts at zero.
    """

    layer: LayerConfig
    lora: int = 0

    def __post_init__(self):
        require(self.lora >= 0, self, "lora", "must be 0 (none) or a rank")

    def build(self, rngs: nnx.Rngs, at: Place) -> "SharedModule":
        return SharedModule(self, rngs, at)


class SharedModule(CorrectedModule):
    """Weights: those of `layer`, held once; down and up per corrected matrix, one for each copy."""

    def __init__(self, config: Shared, rngs: nnx.Rngs, at: Place):
        super().__init__(config.layer, config.lora, rngs, at)
        for _, variable in nnx.to_flat_state(nnx.state(self.layer)):
            variable.set_metadata(shared=True)


def stack(layers: list[LayerConfig]) -> tuple[Sequence, list[tuple[int, int | None, int]]]:
    """The shortest expression for a list of layers: a prefix, a unit repeated, and a remainder.

    Gemma 3's 26 layers of a 5:1 pattern become 4 repeats of 6 and 2 more; DeepSeek's dense first layer is a prefix.

    Args: layers: one config per layer of the published model, in order.
    Returns: the `Sequence`; and for each layer of the list where it went, `(child, copy, place)`: the child of the
      sequence, the copy within that child's `Repeat` (None where the child is no `Repeat`), the place within the unit.
    """
    count, best = len(layers), (len(layers), 0, 1, 0)  # cost, prefix, period, repeats
    for prefix, period in itertools.product(range(count), range(1, count // 2 + 1)):
        repeats = 1
        while layers[prefix : prefix + period] == layers[prefix + repeats * period : prefix + (repeats + 1) * period]:
            repeats += 1
        cost = count - (repeats - 1) * period  # layers written out
        if repeats > 1 and cost < best[0]:
            best = (cost, prefix, period, repeats)
    _, prefix, period, repeats = best
    if not repeats:
        return Sequence(*layers), [(i, None, 0) for i in range(count)]
    unit = Sequence(*layers[prefix : prefix + period])
    rest = layers[prefix + repeats * period :]
    where = [(i, None, 0) for i in range(prefix)]
    where += [(prefix, copy, place) for copy in range(repeats) for place in range(period)]
    where += [(prefix + 1 + i, None, 0) for i in range(len(rest))]
    return Sequence(*layers[:prefix], Repeat(unit, repeats), *rest), where


def unstack(module: nnx.Module) -> nnx.Module:
    """The same network with the copies of every unrolled `Repeat` held apart, as a list.

    For decoding: slicing stacked weights at every step would copy them all. Call it once, outside `jit`.
    """
    def visit(node):
        if isinstance(node, RepeatModule) and not isinstance(node.unit, nnx.List) and not node.scanned:
            node.unit = nnx.List(node.units())
        for child in vars(node).values() if isinstance(node, nnx.Module) else ():
            for grandchild in child if isinstance(child, nnx.List) else (child,):
                if isinstance(grandchild, nnx.Module):
                    visit(grandchild)
        return node

    return visit(nnx.clone(module))


def _is_shared(path, variable) -> bool:
    return variable.get_metadata().get("shared", False)


def _shared_paths(unit) -> set[str]:
    return {path for path, variable in variables_of(unit).items() if _is_shared(path, variable)}


def _split(unit):
    structure, shared, own = nnx.split(unit, _is_shared, ...)
    return own, shared, structure


def _relabel(stacked, n: int):
    """Marks the copies' axis L on what was stacked; keeps one of the copies of what is shared, used n times."""
    structure, shared, own = nnx.split(stacked, _is_shared, ...)
    for _, variable in nnx.to_flat_state(own):
        if "letters" in variable.get_metadata():
            variable.set_metadata(letters="L" + variable.letters)
    reuse(shared, n)
    return nnx.merge(structure, own, jax.tree.map(lambda a: a[0], shared))
