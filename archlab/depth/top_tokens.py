"""Expert choice over depth: a recursion, or a block, chooses the tokens it works on.

Mixture-of-Depths, Raposo et al. 2024 (arXiv:2404.02258, section 3); Mixture-of-Recursions, Bae et al. 2025
(arXiv:2507.10524, section 2.2.1).
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from archlab.depth.router import Choice, TokenRouter
from archlab.depth.routing import budget, choose_best, choose_within_budget
from archlab.depth.scorer import Scorer
from archlab.experts.routers import router_key
from archlab.layers.config import near, require
from archlab.layers.contract import Place, Tokens, wide

GATES = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "linear": lambda logits: logits}


class TopTokens(TokenRouter):
    """A router scores every candidate, `s = w . h`, and the output of the chosen ones is multiplied by its gate.

    In the training form a row's best by s fill the capacity. That looks ahead: whether a token is among the best
    depends on later ones. Otherwise a candidate passes by a rule of its own, if its document's budget has room.

    gate: "sigmoid" or "tanh" of s (Mixture-of-Recursions), or "linear", s itself (Mixture-of-Depths). causal: the rule.
    "loss": s > 0, to which the binary cross-entropy of s with the choice made teaches the router itself. "predictor":
    a second, small network says it; it is taught by the same cross-entropy, but reads the stream without touching it.
    weight: of that loss. hidden: of the router (and of the predictor) as an MLP with one hidden layer; None for linear.
    scale: multiplies the gate. warmup: steps of training over which the capacity falls from 1 to what it is, by half a
    cosine. Until then all tokens have room, which costs the time of a full capacity.
    """

    gate: str = "sigmoid"
    causal: str = "loss"
    weight: float = 0.001
    hidden: int | None = None
    scale: float = 1.0
    warmup: int = 0

    def __post_init__(self):
        require(self.gate in GATES, self, "gate", near(str(self.gate), GATES))
        require(self.causal in ("loss", "predictor"), self, "causal", near(str(self.causal), ("loss", "predictor")))
        require(self.weight >= 0, self, "weight", "must be 0 (none) or positive")
        require(self.hidden is None or self.hidden >= 1, self, "hidden", "must be at least 1, or None for linear")
        require(self.scale > 0, self, "scale", "must be positive")
        require(self.warmup >= 0, self, "warmup", "must be 0 (none) or a number of steps")

    def build(self, rngs: nnx.Rngs, at: Place) -> "TopTokensModule":
        return TopTokensModule(self, rngs, at)


class TopTokensModule(nnx.Module):
    """Weights: router and, where one is asked for, predictor: each a `Scorer`."""

    def __init__(self, config: TopTokens, rngs: nnx.Rngs, at: Place):
        self.config = config
        self.router = Scorer(rngs, at.width, 1, config.hidden)
        self.predictor = Scorer(rngs, at.width, 1, config.hidden) if config.causal == "predictor" else None

    def __call__(self, x: Float[Array, "B T D"], candidates: Bool[Array, "B T"], share: Fraction, room: Fraction,
                 places: Int[Array, "B T"], tokens: Tokens, passed: Int[Array, "B"], look_ahead: bool) -> Choice:
        """As `TokenRouter` says."""
        config = self.config
        logits = self.router(x)[:, :, 0]
        gate = jnp.where(candidates, config.scale * GATES[config.gate](logits), 0)
        if share == 1:
            chosen, passed = choose_within_budget(candidates, Fraction(1), places, tokens.real, passed)
            return Choice(chosen, gate, passed, agreement=jnp.ones(()) if look_ahead else None)
        said = logits if self.predictor is None else self.predictor(jax.lax.stop_gradient(x))[:, :, 0]
        wish = candidates & (said > 0)
        if not look_ahead:
            chosen, passed = choose_within_budget(wish, room, places, tokens.real, passed)
            return Choice(chosen, gate, passed)
        counts = tokens.real.sum(1)
        most, counts = (share, budget(share, counts)) if not config.warmup else (Fraction(1), self._warm(
            share, counts, tokens.training.step))
        chosen = choose_best(logits, candidates, most, counts)
        loss = _mean(jax.nn.softplus(said) - jnp.where(chosen, said, 0), candidates)
        return Choice(chosen, gate, passed, config.weight * loss, _mean(wish == chosen, candidates))

    def _warm(self, share: Fraction, counts, step):
        """How many of `counts` tokens have room at a step of training."""
        done = jnp.minimum(wide(step.astype(jnp.float32)) / self.config.warmup, 1)
        more = (1 - float(share)) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return jnp.maximum(budget(share, counts), jnp.floor((float(share) + more) * counts).astype(jnp.int32))


class RandomTokens(TokenRouter):
    """The control: tokens are drawn without looking at them, and nothing is multiplied (arXiv:2404.02258).

    In the training form each step draws anew. Otherwise what is drawn depends on the layer and on the place in the
    document alone, so that pieces and packed rows agree.
    """

    def build(self, rngs: nnx.Rngs, at: Place) -> "RandomTokensModule":
        return RandomTokensModule(at)


class RandomTokensModule(nnx.Module):
    """Variable: layer, its number, which no gradient moves."""

    def __init__(self, at: Place):
        self.layer = nnx.Variable(jnp.asarray(at.index, jnp.int32), letters="->")

    def __call__(self, x, candidates, share, room, places, tokens, passed, look_ahead) -> Choice:
        """As `TokenRouter` says. Recursions built at one place draw one number for a token: who passes a recursion has
        passed those with more room."""
        gate = jnp.where(candidates, jnp.ones((), wide(x).dtype), 0)
        if share < 1 and look_ahead:
            noise = jax.random.uniform(router_key(tokens), candidates.shape)
            return Choice(choose_best(noise, candidates, share, budget(share, tokens.real.sum(1))), gate, passed)
        key = jax.random.fold_in(jax.random.key(0), self.layer[...])
        draw = lambda place: jax.random.uniform(jax.random.fold_in(key, place))
        wish = candidates & (jax.vmap(jax.vmap(draw))(places) < float(share))
        chosen, passed = choose_within_budget(wish, room, places, tokens.real, passed)
        return Choice(chosen, gate, passed)


def _mean(values: Float[Array, "B T"], where: Bool[Array, "B T"]) -> Float[Array, ""]:
    return jnp.where(where, values, 0).sum() / jnp.maximum(where.sum(), 1)
