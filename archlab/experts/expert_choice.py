"""Expert choice (Zhou et al. 2022, arXiv:2202.09368): experts choose tokens, so that the load is even by construction.

Whether a token is chosen depends on the rest of its row, later tokens included: fine for an encoder, a leak for a
decoder, and no rule to generate by. So only the training form chooses that way. Otherwise a token goes to an expert
for which its score reaches a threshold, which training has moved to where the expert's choice ended: this is causal.

What the leak is worth is seen by three numbers: the loss of the training form, the loss of the deterministic one,
which is what evaluation reports, and the trace `agreement`, how far the two rules agree.
"""

import dataclasses
import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from archlab.experts.capacity import Capacity
from archlab.experts.routers import Router, Routing, largest, pick
from archlab.layers.alphabet import parameter, project
from archlab.layers.config import require
from archlab.layers.contract import Aux, Place, Tokens, wide
from archlab.layers.sharding import per_shard


class ExpertChoice(Router):
    """Each expert takes its `ceil(factor * n / E)` best tokens of a row with n real ones, by `S`, each token's softmax
    over the experts. The weight is S; a token may be taken by any number of experts, or by none.

    The deterministic form: a token goes to those of its `most` best experts whose thresholds S reaches. Losses of
    balance have nothing to do: `MoE(experts, hidden, ExpertChoice(), balance=(ZLoss(),))`. A batch's row is the
    sequence, whatever documents are packed into it.

    factor: how many experts a token goes to on average. most: in the deterministic form, at most; None for
    2 ceil(factor), or all where they are fewer. rate: the share of its distance to the last token chosen by which a
    threshold moves in a step.
    """

    factor: float = 2.0
    most: int | None = None
    rate: float = 0.01
    looks_ahead = True

    def __post_init__(self):
        require(self.factor > 0, self, "factor", "must be positive")
        require(self.most is None or self.most >= 1, self, "most", "must be at least 1, or None")
        require(0 < self.rate <= 1, self, "rate", "must lie in (0, 1]")

    @property
    def k(self) -> int:
        return 2 * math.ceil(self.factor) if self.most is None else self.most

    def check(self, experts: int) -> None:
        require(self.factor <= experts, self, "factor", f"must be at most the number of experts, {experts}")
        require(self.most is None or self.most <= experts, self, "most",
                f"must be at most the number of experts, {experts}")

    def used(self, experts: int) -> float:
        return self.factor

    def build(self, rngs, at, experts, scale):
        return ExpertChoiceModule(self, rngs, at, experts, scale)


class ExpertChoiceModule(nnx.Module):
    """Weight: weight [D, E]; threshold [E], to which `Aux.updates` are added. It starts at the score that a share of
    factor / E of the tokens reaches where logits are as an untrained router gives them, normal and independent.

    Trace, in the training form: agreement, the share of pairs of a real token and an expert for which both rules agree.
    """

    def __init__(self, config: ExpertChoice, rngs: nnx.Rngs, at: Place, experts: int, scale: float):
        self.config = config
        self.weight = parameter(rngs, "D->E", (at.width, experts), scale=scale)
        share = min(config.factor / experts, 1 - 1e-6)
        start = math.exp(scale * NormalDist().inv_cdf(1 - share) - scale**2 / 2) / experts
        self.threshold = nnx.Variable(jnp.full((experts,), start, jnp.float32), letters="->E")

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens) -> Routing:
        logits = project(wide(x), self.weight, "BTD,DE->BTE")
        scores, real, threshold = jax.nn.softmax(logits), tokens.real, self.threshold[...]
        (T, E), config = scores.shape[1:], self.config
        most = min(config.k, E)
        passing = (scores >= threshold) & (scores >= largest(scores, most)[0][..., -1:])
        if tokens.training is None:
            return _routing(passing, most, scores, logits)
        room = Capacity(config.factor).room(1, E, T)
        taken, last = choose(scores, real, jnp.asarray(room)[real.sum(1)], int(room[-1]))
        agree = ((taken == passing) & real[..., None]).sum() / jnp.maximum(real.sum() * E, 1)
        some = real.any(1)[:, None]  # rows of padding alone have no last token
        change = jnp.where(some, last - threshold, 0).sum(0) / jnp.maximum(some.sum(), 1)
        aux = Aux(traces={"agreement": agree}, updates={"threshold": config.rate * change})
        return dataclasses.replace(_routing(taken, E, scores, logits), room=int(room[-1]), aux=aux)


def choose(scores: Float[Array, "B T E"], real: Bool[Array, "B T"], counts: Int[Array, "B"],
           room: int) -> tuple[Bool[Array, "B T E"], Float[Array, "B E"]]:
    """Each expert's `counts` (at most `room`) best of the row's real tokens; and the score of the last of them."""
    def on_own_rows(scores, real, counts):  # as `largest` does
        best, index = jax.lax.top_k(jnp.where(real[..., None], scores, -jnp.inf).swapaxes(1, 2), room)
        within = jnp.broadcast_to(jnp.arange(room) < counts[:, None, None], best.shape)
        taken = jnp.put_along_axis(jnp.zeros(scores.swapaxes(1, 2).shape, bool), index, within, -1, inplace=False)
        last = jnp.take_along_axis(best, jnp.maximum(counts - 1, 0)[:, None, None], -1)[..., 0]
        return taken.swapaxes(1, 2), last

    return per_shard(on_own_rows, "BT. BT B", "BT. B.")(jax.lax.stop_gradient(scores), real, counts)


def _routing(taken: Bool[Array, "B T E"], k: int, scores: Float[Array, "B T E"], logits) -> Routing:
    merit, experts = largest(jnp.where(taken, scores, -1), k)
    experts = jnp.where(merit >= 0, experts, scores.shape[-1])
    return Routing(experts, pick(scores, experts), scores, scores, logits)
