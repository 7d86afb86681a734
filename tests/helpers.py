"""Small things that several tests need."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import archlab
from archlab.layers.config import Config, LayerConfig
from archlab.layers.contract import Tokens, count_positions


def cast(module, dtype):
    """The module, or any pytree, with every float leaf in `dtype`."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, module)


def tokens_of(segments, training=None) -> Tokens:
    """Tokens of some segments [B, T], positions counted."""
    segments = jnp.asarray(segments, jnp.int32)
    none = jnp.zeros(segments.shape[0], jnp.int32)
    return Tokens(segments, count_positions(segments, none, none)[0], training)


def jittered(module, seed: int = 7, size: float = 0.1):
    """The module with noise on every parameter, so that nothing hides behind a zero or a one of the initialisation."""
    leaves, structure = jax.tree.flatten(module)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [a + size * jax.random.normal(k, a.shape, a.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a
             for k, a in zip(keys, leaves)]
    return jax.tree.unflatten(structure, noisy)


def representatives() -> list[str]:
    """A few small models of the zoo in which all kinds of its layers occur, for tests too slow for every model."""
    kinds = {name: {type(config) for _, config in archlab.get_config(name).walk() if isinstance(config, LayerConfig)}
             for name in archlab.list_models("*-nano")}
    chosen, known = [], set()
    while name := max((n for n in kinds if kinds[n] - known), key=lambda n: len(kinds[n] - known), default=None):
        chosen.append(name)
        known |= kinds[name]
    return chosen


def with_scan(config: Config, scan: bool) -> Config:
    """The config with every `scan` field set."""
    for path, node in list(config.walk()):
        if any(field.name == "scan" for field in dataclasses.fields(node)):
            config = config.set(f"{path}.scan" if path else "scan", scan)
    return config


def build(config, seed: int = 0) -> nnx.Module:
    """The model of a config with jittered weights, built under jit."""
    return jittered(jax.jit(lambda: config.build(nnx.Rngs(seed)))())


def in_pieces(run, state, x, tokens: Tokens, cuts) -> jax.Array:
    """The outputs of `run(x, tokens, state)` over pieces of the given widths, each going on from the last, joined."""
    outs, at = [], 0
    for width in cuts:
        piece = lambda a: a[:, at:at + width]
        y, state, _ = run(piece(x), jax.tree.map(piece, tokens), state)
        outs.append(y)
        at += width
    return jnp.concatenate(outs, 1)
