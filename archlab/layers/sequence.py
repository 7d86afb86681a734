"""Layers one after another, side by side, and values handed on by name."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, near, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, wide


class Sequence(LayerConfig):
    """One layer after another: `Sequence(a, b, c)`."""

    layers: tuple[LayerConfig, ...]

    def __init__(self, *layers: LayerConfig, **fields):
        object.__setattr__(self, "layers", tuple(fields.get("layers", layers)))
        require(all(isinstance(c, LayerConfig) for c in self.layers), self, "layers", "each must be a layer config")

    def build(self, rngs: nnx.Rngs, at: Place) -> "SequenceModule":
        return SequenceModule(self, rngs, at)


class SequenceModule(Layer):
    """State: a tuple, one per layer."""

    def __init__(self, config: Sequence, rngs: nnx.Rngs, at: Place):
        self.layers = nnx.List(build_each(config.layers, rngs, at))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return tuple(layer.init_state(batch, max_length, dtype, memory) for layer in self.layers)

    def __call__(self, x, tokens: Tokens, state=None):
        states, aux, end = [], Aux(), len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            given = dataclasses.replace(tokens.fold(i), last_only=tokens.last_only and i == end)
            x, new, said = layer(x, given, None if state is None else state[i])
            tokens = tokens.provide(said.provides)
            aux |= said.within().under(f"layers/{i}")
            states.append(new)
        return x, None if state is None else tuple(states), aux


class Parallel(LayerConfig):
    """Layers side by side on one input: `Parallel(a, b, combine="mean")`.

    combine: "sum" (GPT-J's attention + MLP), "mean" (attention beside SSM heads, Hymba), or "gate": a softmax over the
    branches, per token, of a learned projection of the input (equal weights at the start).
    """

    layers: tuple[LayerConfig, ...]
    combine: str = "sum"

    def __init__(self, *layers: LayerConfig, combine: str = "sum", **fields):
        object.__setattr__(self, "layers", tuple(fields.get("layers", layers)))
        object.__setattr__(self, "combine", combine)
        require(len(self.layers) > 0, self, "layers", "needs at least one")
        require(combine in ("sum", "mean", "gate"), self, "combine", near(str(combine), ("sum", "mean", "gate")))

    def build(self, rngs: nnx.Rngs, at: Place) -> "ParallelModule":
        return ParallelModule(self, rngs, at)


class ParallelModule(Layer):
    """State: a tuple, one per layer. Weight: gate [D, branches] where gated."""

    def __init__(self, config: Parallel, rngs: nnx.Rngs, at: Place):
        self.layers = nnx.List(build_each(config.layers, rngs, at))
        self.combine = config.combine
        gated, zeros = config.combine == "gate", nnx.initializers.zeros
        self.gate = parameter(rngs, "D->.", (at.width, len(config.layers)), zeros) if gated else None

    init_state = SequenceModule.init_state

    def __call__(self, x, tokens: Tokens, state=None):
        outs, states, aux = [], [], Aux()
        for i, layer in enumerate(self.layers):
            y, new, said = layer(x, tokens.fold(i), None if state is None else state[i])
            outs.append(y)
            states.append(new)
            aux |= said.under(f"layers/{i}")
        if self.combine == "gate":
            share = jax.nn.softmax(wide(project(x, self.gate, "BTD,DP->BTP")), axis=-1).astype(x.dtype)
            y = sum(share[..., i, None] * out for i, out in enumerate(outs))
        else:
            y = sum(outs) / (len(outs) if self.combine == "mean" else 1)
        return y, None if state is None else tuple(states), aux


class Gated(LayerConfig):
    """`sigmoid(w . x) layer(x)`, one gate for each token: Qwen2-MoE's shared expert (arXiv:2407.10671, section 2.2)."""

    layer: LayerConfig

    def build(self, rngs: nnx.Rngs, at: Place) -> "GatedModule":
        return GatedModule(self, rngs, at)


class GatedModule(Layer):
    """Weights: weight [D, 1] and those of `layer`."""

    def __init__(self, config: Gated, rngs: nnx.Rngs, at: Place):
        self.weight = parameter(rngs, "D->.", (at.width, 1))
        self.layer = config.layer.build(rngs, at)

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return self.layer.init_state(batch, max_length, dtype, memory)

    def __call__(self, x, tokens: Tokens, state=None):
        y, state, aux = self.layer(x, tokens, state)
        gate = jax.nn.sigmoid(wide(project(x, self.weight, "BTD,DP->BTP"))).astype(x.dtype)
        return gate * y, state, aux.under("layer")


class Provide(LayerConfig):
    """Publishes a value of `layer` under `name` for the rest of the enclosing `Sequence` or `Recur`.

    The value is the layer's output, or its trace called `trace` (RWKV-7's first value; MoR's shared keys and values).
    Later layers read it from `tokens.provided[name]`.
    """

    name: str
    layer: LayerConfig
    trace: str | None = None

    def build(self, rngs: nnx.Rngs, at: Place) -> "ProvideModule":
        return ProvideModule(self, rngs, at)


class ProvideModule(Layer):
    def __init__(self, config: Provide, rngs: nnx.Rngs, at: Place):
        self.layer = config.layer.build(rngs, at)
        self.name, self.trace = config.name, config.trace

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return self.layer.init_state(batch, max_length, dtype, memory)

    def __call__(self, x, tokens: Tokens, state=None):
        y, state, aux = self.layer(x, tokens, state)
        if self.trace is not None and self.trace not in aux.traces:
            raise ValueError(f"Provide.trace = {self.trace!r}: the layer's traces are {sorted(aux.traces)}")
        value = y if self.trace is None else aux.traces[self.trace]
        return y, state, Aux(provides={self.name: value}) | aux.under("layer")


class Identity(LayerConfig):
    """The layer that does nothing: `Provide("embedding", Identity())` publishes what flows past."""

    def build(self, rngs: nnx.Rngs, at: Place) -> "IdentityModule":
        return IdentityModule()


class IdentityModule(Layer):
    def __call__(self, x, tokens: Tokens, state=None):
        return x, None, Aux()


def build_each(configs, rngs: nnx.Rngs, at: Place) -> list[Layer]:
    """Modules of configs that follow one another: each begins where the one before it ends."""
    layers, index = [], at.index
    for config in configs:
        layers.append(config.build(rngs, at._replace(index=index)))
        index = index + config.branches
    return layers
