"""What a look ahead is worth: the loss when routers choose among all of a row's tokens, and when they may not.

A router that takes a row's best tokens sees later ones: that is how it is trained (Mixture-of-Depths, arXiv:2404.02258;
Mixture-of-Recursions, arXiv:2507.10524; expert choice, arXiv:2202.09368), and no way to generate. Three numbers tell
what the causal rule in its place costs: both losses, and how often the two routings agree.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from archlab.data.batches import Batch
from archlab.layers.config import Config
from archlab.layers.contract import Training
from archlab.layers.traces import per_layer
from archlab.layers.weights import merge, split
from archlab.model import LanguageModel
from archlab.training.evaluation import Evaluation, sums_over, totals
from archlab.training.objectives import prepare
from archlab.training.step import abstract

LATE = 2**30  # a step after all warm-ups


@dataclasses.dataclass(frozen=True)
class LookAhead:
    """Both evaluations of one text. ahead: leaky, in the training form without dropout. causal: the one that counts.

    agreement: the share of tokens that go equally deep in both, in every layer; None for a model without depth.
    depths: path -> how deep a token goes on average, in the look ahead and causally.
    routers: path -> the share of candidates on which, in the look ahead, the causal rule (before budgets) and the
    choice made agree: how well a predictor predicts; of experts, of pairs of a token and an expert. A rule that lets
    nobody pass is right about all but the capacity.
    """

    ahead: Evaluation
    causal: Evaluation
    agreement: float | None
    depths: dict[str, tuple[float, float]]
    routers: dict[str, float]

    def as_dict(self) -> dict:
        """For JSON: losses in nats per target, bits per byte, agreement, routers."""
        return {"look_ahead_loss": self.ahead.loss, "causal_loss": self.causal.loss,
                "look_ahead_bits_per_byte": self.ahead.bits_per_byte, "causal_bits_per_byte": self.causal.bits_per_byte,
                "agreement": self.agreement, "depths": self.depths, "routers": self.routers}

    def __str__(self) -> str:
        """The three numbers as lines."""
        lines = [f"loss, look-ahead routing (leaky)   {self.ahead.loss:>8.4f} nats per token",
                 f"loss, causal routing               {self.causal.loss:>8.4f} nats per token"]
        if self.agreement is not None:
            lines.append(f"tokens on which the two agree      {self.agreement:>8.2%}")
        lines += [f"depth, look-ahead; causal       {ahead:>5.3f}; {causal:.3f}  {path}"
                  for path, (ahead, causal) in self.depths.items()]
        lines += [f"rule against choice made           {share:>8.2%}  {path}" for path, share in self.routers.items()]
        return "\n".join(lines)


def make_look_ahead_step(config: LanguageModel, bytes_per_token: np.ndarray, seed: int = 0):
    """A jitted function of (params, rest, batch) for `look_ahead`. seed: of what the training form draws. ValueError
    where the model's training form does not look ahead."""
    if not config.body.looks_ahead:
        raise ValueError("the training form of this model does not look ahead: there is one loss, that of `evaluate`")
    structure, steady = (split(abstract(form))[0] for form in (config, without_dropout(config)))

    def step(params, rest, batch: Batch):
        batch = prepare(config, batch, jax.random.key(seed))
        causal, said = sums_over(merge(structure, params, rest), batch, bytes_per_token)
        training = Training(jax.random.key(seed), jnp.int32(LATE))
        ahead, told = sums_over(merge(steady, params, rest), batch, bytes_per_token, training)
        depths = {path: (told.traces[path], depth) for path, depth in said.traces.items() if path.endswith("/depth")
                  and depth.shape == told.traces[path].shape and depth.shape[-2:] == batch.ids.shape}
        differ = jnp.zeros(batch.ids.shape, bool)
        for a, b in depths.values():  # padding is 0 deep in both, wherever it stands
            differ |= (a != b).reshape(-1, *differ.shape).any(0)
        sums = {path: jnp.stack([depth.sum((-2, -1)) for depth in both], -1) for path, both in depths.items()}
        agreements = {path: value for path, value in told.traces.items() if path.endswith("/agreement")}
        return ahead, causal, (differ.sum(), (batch.segments > 0).sum()), sums, agreements, jnp.ones(())

    return jax.jit(step)


def look_ahead(step, params, rest, batches: Iterable[Batch], mesh=None) -> LookAhead:
    """Evaluates both ways; `step` is from `make_look_ahead_step`. ValueError where there is no batch."""
    ahead, causal, (differ, tokens), sums, agreements, count = totals(step, params, rest, batches, mesh)
    tokens = max(tokens, 1)
    depths = {path: tuple(map(float, total / tokens)) for path, total in per_layer(sums, "depth", 1).items()}
    routers = {path: float(total / count) for path, total in per_layer(agreements, "agreement", 0).items()}
    return LookAhead(Evaluation(*ahead), Evaluation(*causal), 1 - float(differ / tokens) if depths else None, depths,
                     routers)


def without_dropout(config: LanguageModel) -> LanguageModel:
    """The config with every dropout at 0: the same weights fit."""
    def change(part: Config) -> Config:
        dropping = getattr(part, "dropout", 0)
        return part.set("dropout", 0.0) if isinstance(dropping, float) and dropping else part

    return config.map(change)
