"""Step sizes: how state-space layers draw the biases of their softplus."""

import math

import jax
import jax.numpy as jnp


def step_bias(key, shape, dtype, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4):
    """softplus^-1 of step sizes drawn log-uniformly from [low, high] (Gu & Dao 2023, arXiv:2312.00752, section 3.6)."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))
    step = jnp.maximum(step, floor)
    return step + jnp.log(-jnp.expm1(-step))
