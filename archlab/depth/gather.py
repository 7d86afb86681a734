"""Only some tokens of a row pass through a layer: they are gathered, so that what is left out takes no time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from archlab.layers.contract import Aux, Layer, Tokens
from archlab.layers.sharding import per_shard


def through(unit: Layer, x: Float[Array, "B T D"], chosen: Bool[Array, "B T"], slots: int, tokens: Tokens,
            state: Any = None, warmup: int = 0) -> tuple[Float[Array, "B T D"], Any, Aux]:
    """`unit` over the chosen tokens of each row alone: 0 for all others; the unit's state, and its aux.

    The chosen stand first, in their order; the slots they leave empty are padding, the identity on every state.
    Published values of [B, T] are gathered with their tokens. The unit's traces are over what was gathered: not [B, T].
    A step of decoding for which nobody was chosen does no work; its traces are 0.

    Args: slots: for how many tokens a row has room, at most T; more chosen ones than that must not be. warmup: before
      this step of training there is room for all (both sizes are compiled then, and the unit's traces are dropped).
    """
    def run(slots: int):
        return _gathered(unit, x, chosen, slots, tokens, state)

    def untraced(slots: int):
        y, state, aux = run(slots)
        return y, state, dataclasses.replace(aux, traces={})

    if warmup:
        return jax.lax.cond(tokens.training.step < warmup, lambda: untraced(x.shape[1]), lambda: untraced(slots))
    if x.shape[1] > 1 or state is None:
        return run(slots)
    def step():
        y, after, aux = run(1)
        return y, None if only_read else after, aux

    def idle():
        y, _, aux = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(step))
        return y, None if only_read else state, aux

    only_read = tokens.keys == "read"  # such a state need not pass through the branches, which might copy it
    y, after, aux = jax.lax.cond(chosen.any(), step, idle)
    return y, state if only_read else after, aux


def _gathered(unit: Layer, x, chosen, slots: int, tokens: Tokens, state):
    B, T = chosen.shape
    # per shard: left to the compiler, a sort gathers all rows of the batch on every device
    order = per_shard(lambda chosen: jnp.argsort(~chosen, axis=1, stable=True), "BT", "BT")(chosen)
    index = order[:, :slots]

    def take(a):
        return jnp.take_along_axis(a, index.reshape(index.shape + (1,) * (a.ndim - 2)), axis=1)

    here = take(chosen)
    provided = jax.tree.map(lambda a: take(a) if a.shape[:2] == (B, T) else a, tokens.provided)
    gathered = dataclasses.replace(tokens, segments=jnp.where(here, take(tokens.segments), 0),
                                   positions=take(tokens.positions), provided=provided, last_only=False)
    y, state, aux = unit(take(x), gathered, state)
    if aux.policies:
        back = jnp.argsort(order, axis=1)
        policies = {name: policy.take(back, chosen) for name, policy in aux.policies.items()}
        aux = dataclasses.replace(aux, policies=policies)
    y = jnp.where(here[:, :, None], y, 0)
    return jnp.zeros_like(x).at[jnp.arange(B)[:, None], index].set(y, unique_indices=True), state, aux
