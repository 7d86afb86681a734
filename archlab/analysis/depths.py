"""How deep each token went, from what the layers said."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

TRACES = ("depth", "steps")  # of routed recursion and routed blocks; of halting


def total_depth(traces: Mapping[str, jax.Array], shape: tuple[int, int]) -> Int[Array, "B T"] | None:
    """The sum over layers of what each gave a token: recursions, routed blocks passed, steps before halting.

    None where no layer says so of all tokens. shape: (B, T). Traces over tokens that were gathered are passed over.
    """
    found = [trace.reshape(-1, *shape).sum(0) for path, trace in traces.items()
             if path.split("/")[-1] in TRACES and trace.shape[-2:] == tuple(shape)]
    return jnp.stack(found).sum(0).astype(jnp.int32) if found else None
