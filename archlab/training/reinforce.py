"""REINFORCE: what was drawn is judged by the loss that came of it (Williams 1992, Machine Learning 8).

A layer that draws a decision for each token says with what probability, and what the decision spent
(`Aux.policies`). A draw that did better than the others of the batch is then made likelier.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from archlab.layers.contract import Policy


def surrogate(nll: Float[Array, "B T"], weights: Float[Array, "B T"], segments: Int[Array, "B T"],
              policies: dict[str, Policy]) -> Float[Array, ""]:
    """A number whose gradient is the policies'; its value means nothing.

    The draw for token t is charged `cost_t + sum over s >= t of discount^(s - t) nll_s`, over t's own document: with a
    discount of 0 its own loss alone. Its advantage is how much less that is than the mean over the batch; the sum of
    `- weight * advantage * log_prob` over all tokens with a target is returned (the nll's sum has the same scale).

    Args: nll, weights: of each token's target, as in the loss; segments: documents, 0 for padding; policies: by path.
    Raises ValueError for a policy that is not over these tokens.
    """
    total, judged = jnp.zeros((), nll.dtype), weights > 0
    nll = jax.lax.stop_gradient(jnp.where(judged, nll * weights, 0))
    for path, policy in policies.items():
        if policy.log_prob.shape[-2:] != nll.shape:
            raise ValueError(f"{path}: drawn for tokens {policy.log_prob.shape[-2:]}, the loss is of {nll.shape}")
        copies = jax.tree.map(lambda a, ndim: a.reshape(-1, *a.shape[a.ndim - ndim :]), policy, Policy(2, 2, 0, 0))
        charge = jax.lax.stop_gradient(copies.cost) + jax.vmap(_discounted, (None, None, 0))(
            nll, segments, copies.discount)
        baseline = jnp.where(judged, charge, 0).sum((1, 2)) / jnp.maximum(judged.sum(), 1)
        gain = jnp.where(judged, (charge - baseline[:, None, None]) * copies.log_prob, 0).sum((1, 2))
        total += (copies.weight * gain).sum()
    return total


def _discounted(values: Float[Array, "B T"], segments: Int[Array, "B T"], discount: jax.Array) -> Float[Array, "B T"]:
    """`sum over s >= t of discount^(s - t) values_s` over t's document: a recurrence, last token first."""
    goes_on = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)))

    def compose(later, sooner):
        return later[0] * sooner[0], sooner[1] + sooner[0] * later[1]

    return jax.lax.associative_scan(compose, (discount * goes_on, values), reverse=True, axis=1)[1]
