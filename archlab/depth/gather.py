"""Only some tokens of a row pass through a layer: they are gathered, so that what is left out takes no time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from archlab.layers.contract import Aux, Layer, Tokens
from archlab.layers.sharding import per_shard


def through(unit: Layer, x: Float[Array, "B T D"], chosen: Bool[Array, "B T"], slots: int, tokens: Tokens,
            state: Any = None) -> tuple[Float[Array, "B T D"], Any, Aux]:
    """`unit` over the chosen tokens of each row alone: 0 for all others; the unit's state, and its aux.

    The chosen stand first, in their order; the slots they leave empty are padding, the identity on every state.
    Published values of [B, T] are gathered with their tokens. The unit's traces are over what was gathered: not [B, T].

    Args: slots: for how many tokens a row has room, at most T; more chosen ones than that must not be.
    """
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


def where_any(chosen: Bool[Array, "B T"], run: Callable, state: Any):
    """What `run()` gives, (y, state, aux), if any token is chosen; otherwise zeros, `state` as it was, and no work."""
    def idle():
        y, _, aux = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run))
        return y, state, aux

    return jax.lax.cond(chosen.any(), run, idle)
