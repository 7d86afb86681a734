"""Optimizers, told by the parameters which of them are matrices, want to be small, or learn at a rate of their own; and
their schedules."""

import math
from collections.abc import Callable

import jax
import optax

from archlab.layers.alphabet import is_matrix
from archlab.layers.config import Config, near, require
from archlab.model import LanguageModel
from archlab.training.factored import matrix_axes, scale_by_factored_rms
from archlab.training.transfer import rates as transfer_rates

NAMES = ("adamw", "muon", "adafactor")
SCHEDULES = ("cosine", "wsd", "constant")


class Optimizer(Config):
    """What turns gradients into updates.

    name: "adamw" (arXiv:1711.05101); "muon" (Jordan et al. 2024, scaled as in arXiv:2502.16982 so that AdamW's
      learning rates and decay fit) for matrices and AdamW for the rest; "adafactor" (arXiv:1804.04235).
    learning_rate: at its peak. schedule: "cosine", "wsd" (warm-up, stable, decay) or "constant".
    warmup: share of the steps in which it rises from 0, linearly. decay: share of the steps in which "wsd" falls.
    floor: where it ends, as a share of the peak.
    weight_decay: per step and unit of learning rate, for parameters that say they decay. clip: largest global norm
      of the gradient, 0 for any. b1, b2: of the moments (Muon's momentum is 0.95; Adafactor's b2 follows the step).
    base: the model at which learning_rate was tuned; None for the one that is trained. Where a parameter sums over more
      inputs than there its updates shrink, but not its decay (`training/transfer.py`; the trained model is to come from
      `transfer(model, base)`).
    """

    name: str = "adamw"
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    floor: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    base: LanguageModel | None = None

    def __post_init__(self):
        require(self.name in NAMES, self, "name", near(str(self.name), NAMES))
        require(self.schedule in SCHEDULES, self, "schedule", near(str(self.schedule), SCHEDULES))
        require(self.learning_rate > 0, self, "learning_rate", "must be above 0")
        for field in ("warmup", "decay", "floor"):
            require(0 <= getattr(self, field) <= 1, self, field, "must be a share, from 0 to 1")
        require(self.schedule != "wsd" or self.warmup + self.decay <= 1, self, "decay", "must leave room for warmup")
        for field in ("weight_decay", "clip"):
            require(getattr(self, field) >= 0, self, field, "must be at least 0")
        for field in ("b1", "b2"):
            require(0 <= getattr(self, field) < 1, self, field, "must be at least 0 and below 1")

    def rate(self, steps: int) -> Callable[[int], float]:
        """The learning rate as a function of the step, counted from 0, of a run of so many `steps`.

        With w steps of warm-up the rate at step i < w is (i + 1) / w of the peak. After that, from x = 0 to 1 over what
        is left: cosine is floor + (1 - floor) (1 + cos(pi x)) / 2; wsd is 1 until its last `decay` of the steps, and in
        these floor + (1 - floor) (1 - sqrt(x)) (arXiv:2405.18392).
        """
        warmup, start = round(self.warmup * steps), self.falls_from(steps)
        shape = {"cosine": lambda x: (1 + math.cos(math.pi * x)) / 2, "wsd": lambda x: 1 - math.sqrt(x),
                 "constant": lambda x: 1.0}[self.schedule]

        def rate(step: int) -> float:
            rising = min((step + 1) / max(warmup, 1), 1)
            x = min(max((step - start) / max(steps - start, 1), 0), 1)
            return self.learning_rate * rising * (self.floor + (1 - self.floor) * shape(x))

        return rate

    def falls_from(self, steps: int) -> int:
        """After how many of `steps` the learning rate begins to fall; `steps` where it never does."""
        return {"cosine": round(self.warmup * steps), "wsd": steps - round(self.decay * steps),
                "constant": steps}[self.schedule]

    def build(self, parameters: dict[str, jax.Array]) -> optax.GradientTransformation:
        """The optax transformation over flat dictionaries {path: array}, for a learning rate of 1: what it gives is
        multiplied by `rate(steps)(step)` at each step.

        Args: parameters: {path: nnx.Param}, real or abstract, as `parameters_of` gives them.
        """
        letters = {path: weight.letters for path, weight in parameters.items()}
        decays = {path: weight.decay for path, weight in parameters.items()}
        rates = {path: weight.rate for path, weight in parameters.items()}
        adam = optax.scale_by_adam(self.b1, self.b2)
        if self.name == "adamw":
            direction = adam
        elif self.name == "adafactor":
            direction = optax.chain(scale_by_factored_rms(letters), optax.ema(self.b1, debias=False))
        else:
            direction = optax.partition({"matrix": _muon(letters), "other": adam}, muon_labels(letters))
        if self.base is not None:  # before decay is added: decay per step is that of the base
            direction = optax.chain(direction, _times(transfer_rates(parameters, self.base, self.name)))
        return optax.chain(
            optax.clip_by_global_norm(self.clip) if self.clip else optax.identity(),
            direction,
            optax.add_decayed_weights(self.weight_decay, decays),
            _times(rates),
            optax.scale(-1),
        )


def _times(factors: dict[str, float]) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: {path: factors[path] * update for path, update in updates.items()})


def muon_labels(letters: dict[str, str]) -> dict[str, str]:
    """{path: "matrix" or "other"}: which parameters Muon takes."""
    return {path: "matrix" if is_matrix(word) else "other" for path, word in letters.items()}


def _muon(letters: dict[str, str]) -> optax.GradientTransformation:
    """Orthogonalised momentum, scaled to the root mean square that Adam's updates have: 0.2 (arXiv:2502.16982)."""
    is_mine = lambda value: not isinstance(value, optax.MaskedNode)  # the parameters left to Adam are masked

    def numbers(updates):
        return {path: optax.contrib.MuonDimensionNumbers(*matrix_axes(letters[path])) if is_mine(update) else update
                for path, update in updates.items()}

    def scale(path, update):
        rows, columns = (math.prod(update.shape[axis] for axis in axes) for axes in matrix_axes(letters[path]))
        return 0.2 * math.sqrt(max(rows, columns)) * update

    resize = optax.stateless(lambda updates, _: {path: scale(path, update) if is_mine(update) else update
                                                 for path, update in updates.items()})
    return optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=numbers), resize)
