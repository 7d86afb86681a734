"""Mixture of routers: several routers decide in stages, each refining the decision of the one before."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from archlab.experts.balance import SwitchLoss, count, routing_traces
from archlab.experts.routers import Router, Routing, largest, pick, router_key
from archlab.experts.sampled import Reinforce, draw, log_chance
from archlab.layers.alphabet import parameter, project
from archlab.layers.config import require
from archlab.layers.contract import Aux, Place, Tokens, wide


class MixtureOfRouters(Router):
    """Each stage reads the token and what has been decided so far, the mean embedding of the experts by their
    probabilities; adds to the logits of the stage before; and keeps the best of that stage's candidates.

    The weights are the last stage's probabilities, a softmax over the candidates it was left.

    stages: how many candidates each keeps, never growing; the last is k. balance: weight of a `SwitchLoss` for each
    stage but the last, which the balance of `MoE` judges. skip: whether a token may pass the layer unchanged: it runs
    where a gate, sigmoid of what the last stage reads, is above 1/2; the gate multiplies the weights. price: nats a
    token that runs costs; the gate learns to avoid it (a loss, price times the mean gate). reinforce: in the training
    form experts are drawn from the last stage's softmax and running from the gate, and both are trained by the loss
    that came of it, the price charged where a token ran; the price is then no loss of its own.
    """

    stages: tuple[int, ...] = (8, 4, 2)
    balance: float = 0.01
    skip: bool = False
    price: float = 0.0
    reinforce: Reinforce | None = None

    def __post_init__(self):
        require(len(self.stages) > 0 and self.stages[-1] >= 1, self, "stages", "each stage must keep at least 1")
        require(all(a >= b for a, b in zip(self.stages, self.stages[1:])), self, "stages",
                "must not grow: a stage keeps some of what the stage before it kept")
        require(self.balance >= 0, self, "balance", "must not be negative")
        require(self.price >= 0, self, "price", "must not be negative")
        require(self.skip or not self.price, self, "price", "is for running the layer: it wants skip=True")

    @property
    def k(self) -> int:
        return self.stages[-1]

    def check(self, experts: int) -> None:
        require(self.stages[0] <= experts, self, "stages", f"must be at most the number of experts, {experts}")

    def build(self, rngs, at, experts, scale):
        return MixtureOfRoutersModule(self, rngs, at, experts, scale)


class MixtureOfRoutersModule(nnx.Module):
    """Weights: weight, one [D, E] for each stage; embedding [E, D] of the experts, zeros at first; gate [D, 1] and
    gate_bias [1] where a token may skip.

    Losses: stage_0, ...; price. Traces: stage_entropy [stages], of a token's probabilities in nats; skipped, the share
    of real tokens. Policy: draw.
    """

    def __init__(self, config: MixtureOfRouters, rngs: nnx.Rngs, at: Place, experts: int, scale: float):
        D, E, self.config = at.width, experts, config
        self.weight = nnx.List([parameter(rngs, "D->E", (D, E), scale=scale) for _ in config.stages])
        self.embedding = parameter(rngs, "E->D", (E, D))
        self.gate = parameter(rngs, "D->.", (D, 1), scale=scale) if config.skip else None
        self.gate_bias = parameter(rngs, "->.", (1,), nnx.initializers.ones) if config.skip else None

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens) -> Routing:
        config, x, real, last = self.config, wide(x), tokens.real, len(self.weight) - 1
        drawn = tokens.training is not None and config.reinforce is not None
        read, logits, candidates, aux, entropy = x, 0, True, Aux(), []
        for i, keep in enumerate(config.stages):
            logits = logits + project(read, self.weight[i], "BTD,DE->BTE")
            left = jnp.where(candidates, logits, -jnp.inf)
            probs = jax.nn.softmax(left)
            draws = drawn and i == last
            experts = draw(left, keep, router_key(tokens)) if draws else largest(left, keep)[1]
            routing = Routing(experts, pick(probs, experts), probs, probs, logits, aux=aux)
            entropy.append(routing_traces(routing, real)["entropy"])
            if i < last:
                aux.losses[f"stage_{i}"] = config.balance * SwitchLoss()(routing, real)
                candidates = (experts[..., None] == jnp.arange(probs.shape[-1])).any(-2)
                read = x + project(probs, self.embedding, "BTE,ED->BTD")
        aux.traces["stage_entropy"] = jnp.stack(entropy)
        log_prob = log_chance(left, experts) if drawn else None
        return self._skip(routing, read, tokens, log_prob) if config.skip else self._say(routing, log_prob, 0.0)

    def _skip(self, routing: Routing, read, tokens: Tokens, log_prob) -> Routing:
        """The routing with nobody for those who pass the layer. log_prob: of the experts, where they were drawn."""
        logit = project(read, self.gate, "BTD,DN->BTN")[..., 0] + self.gate_bias[...].astype(read.dtype)
        gate, runs, real = jax.nn.sigmoid(logit), logit > 0, tokens.real
        if log_prob is not None:
            runs = jax.random.bernoulli(jax.random.fold_in(router_key(tokens), 1), gate)
            log_prob = jnp.where(runs, jax.nn.log_sigmoid(logit) + log_prob, jax.nn.log_sigmoid(-logit))
        elif self.config.reinforce is None:
            routing.aux.losses["price"] = self.config.price * jnp.where(real, gate, 0).sum() / count(real)
        routing.aux.traces["skipped"] = (real & ~runs).sum() / count(real)
        experts = jnp.where(runs[..., None], routing.experts, routing.probs.shape[-1])
        gates = gate[..., None] * routing.gates
        routing = dataclasses.replace(routing, experts=experts, gates=gates, weights=pick(gates, experts))
        return self._say(routing, log_prob, self.config.price * runs)

    def _say(self, routing: Routing, log_prob, cost) -> Routing:
        if log_prob is not None:
            cost = jnp.broadcast_to(jnp.asarray(cost, log_prob.dtype), log_prob.shape)
            routing.aux.policies["draw"] = self.config.reinforce.policy(log_prob, cost)
        return routing
