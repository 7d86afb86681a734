"""The ladder: one dial, the size N, sets everything else, by the same formulas for every architecture.

    size            N = parameters that a token meets, without the tables over the vocabulary
    depth           n = n_0 (N / N_0)^(1/3) copies in each `Repeat`, rounded; N_0 and n_0 are those of the model given
    width           the valid one at which N comes nearest: it grows as N^(1/3), too, so that width over depth stays
                    (where valid widths lie too far apart, `match` finds one, and MLPs make up for the rest)
    heads           as many as the width has room for at the model's own head size; MLPs and experts keep their ratio
    batch           4096 (N / 10^6)^(1/3) tokens, as a power of two of rows
    learning rate   0.003 (N / 10^6)^(-1/3) times each factor that is tried
    warm-up         N tokens, but at most a tenth of the size's shortest run
    decay           the last fifth of the steps, to 0, as 1 - sqrt(x) (arXiv:2405.18392)
    tokens          D = C / (FLOPs per token), in whole steps, for a budget of C FLOPs

The powers of batch and learning rate are near those of OLMo's ladder (2/3 and -1/3: Bhagia et al. 2024,
arXiv:2412.04403), as is the warm-up (a token a parameter). Its batch is made for D = 20 N; here a size is trained on
many D, and one batch for all of them lets the budgets of a size share one trunk.

A budget alone gives sizes too: with D = 20 N (Hoffmann et al. 2022, arXiv:2203.15556), C = 6 N D gives
N = sqrt(C / 120), and others lie around it.
"""

import dataclasses
import math
from collections.abc import Sequence

from archlab.analysis.accounts import count_parameters
from archlab.analysis.conventions import conventions, groups
from archlab.analysis.matching import match, scaled
from archlab.layers.config import Config
from archlab.layers.repeat import Repeat
from archlab.model import LanguageModel
from archlab.training.optimizers import Optimizer
from archlab.training.run import Run
from archlab.training.transfer import transfer

# Fields that grow with the width; head sizes stay.
GROWING = ("hidden", "heads", "kv_heads", "rank", "query_rank", "dt_rank")
TOLERANCE = 0.2  # how far from its size a rung may lie: narrow widths lie far apart
TRANSFERS = {"none": None, "mup": 0.0, "completep": 1.0}  # the power of depth by which residual branches shrink


@dataclasses.dataclass(frozen=True, eq=False)
class Rung:
    """An architecture at one size.

    size: as asked for. batch: rows. learning_rate: before the factors. flops_per_token: of training, as counted.
    N, parameters: what `conventions` (a sixth of them) and `groups` say of it. base: the model from which learning
    rates are carried over, None where they follow the formula.
    """

    name: str
    size: float
    model: LanguageModel
    context: int
    batch: int
    learning_rate: float
    flops_per_token: float
    N: dict[str, float]
    parameters: dict[str, float]
    base: LanguageModel | None = None

    @property
    def layers(self) -> int:
        """Copies in all `Repeat`s that are not inside one another; 1 without any."""
        return sum(c.n for c in _repeats(self.model.body)) or 1

    def steps(self, budget: float) -> int:
        """How many steps a budget of training FLOPs buys."""
        return round(budget / (self.flops_per_token * self.batch * self.context))

    def run(self, budget: float, smallest: float, factor: float = 1.0, seed: int = 0, data: str = "stdlib",
            tokenizer: str = "bytes") -> Run:
        """The training of `budget` FLOPs. smallest: the least budget of this size; all branch off from one trunk."""
        steps = self.steps(budget)
        warmup = max(1, round(min(self.size / (self.batch * self.context), 0.1 * self.steps(smallest))))
        optimizer = Optimizer(learning_rate=self.learning_rate * factor, schedule="wsd", warmup=warmup / steps,
                              decay=0.2, floor=0.0, base=self.base)
        return Run(self.model, steps, self.batch, self.context, data, tokenizer, seed, optimizer=optimizer)


def rungs(name: str, model: LanguageModel, sizes: Sequence[float], context: int,
          transferred: str = "none") -> list[Rung]:
    """The rungs of an architecture, from the smallest size on.

    transferred: "none": the learning rate follows the formula. "mup": over width, from the smallest size
    (arXiv:2203.03466); "completep": over depth as well (arXiv:2505.01618).
    ValueError where no valid width comes near a size, or two sizes come out the same.
    """
    if transferred not in TRANSFERS:
        raise ValueError(f"transfer = {transferred!r}: must be one of {', '.join(TRANSFERS)}")
    models = {size: at_size(model, size) for size in sorted(sizes)}
    if len(set(models.values())) < len(models):
        raise ValueError(f"{name}: two of the sizes {', '.join(f'{size:.3g}' for size in models)} give the same model")
    smallest = min(models)
    made = []
    for size, config in models.items():
        base = None
        if transferred != "none":
            base, config = models[smallest], transfer(config, models[smallest], TRANSFERS[transferred])
        flops = conventions(config, context)
        rows = max(1, 2 ** round(math.log2(4096 * (size / 1e6) ** (1 / 3) / context)))
        rate = 3e-3 * ((smallest if base else size) / 1e6) ** (-1 / 3)
        made.append(Rung(name, size, config, context, rows, rate, flops["counted"],
                         {key: value / 6 for key, value in flops.items()}, groups(config), base))
    return made


def at_size(model: LanguageModel, size: float) -> LanguageModel:
    """The architecture with depth and width of this size; ValueError where no valid width comes near it."""
    if size <= 0:
        raise ValueError(f"size = {size!r}: must be positive")
    deeper = (size / count_parameters(model).active_body) ** (1 / 3)
    model = model.set("body", _deepened(model.body, deeper))
    grain, tried = 4 if model.width <= 256 else 16, {}
    guess = model.width * (size / count_parameters(model).active_body) ** 0.5
    for _ in range(5):
        found = _near(model, grain * max(1, round(guess / grain)), grain)
        if found is None or found in tried:
            break
        tried[found] = math.log(count_parameters(found).active_body / size)
        guess = found.width * math.exp(-tried[found] / 2)  # most of N grows with the square of the width
    best = min(tried, key=lambda found: abs(tried[found]), default=model)
    return best if abs(tried.get(best, math.inf)) <= TOLERANCE else match(best, size)


def resize(model: LanguageModel, width: int, depth: int | None = None) -> LanguageModel:
    """The architecture at another width, and with `depth` copies in its outermost `Repeat`s (they keep their ratio);
    ValueError where its layers do not allow the width."""
    if depth is not None:
        model = model.set("body", _deepened(model.body, depth / (sum(c.n for c in _repeats(model.body)) or depth)))
    return scaled(model, width, GROWING)


def sizes_around(budgets: Sequence[float], per_budget: int = 5, ratio: float = 2.0) -> list[float]:
    """Sizes for isoFLOP curves: around sqrt(C / 120) for the geometric middle of the budgets, each `ratio` times the
    last, from what fits the smallest budget to what fits the largest."""
    low, high = (math.sqrt(budget / 120) for budget in (min(budgets), max(budgets)))
    first, last = low * ratio ** (-(per_budget // 2)), high * ratio ** (per_budget // 2)
    count = max(per_budget, round(math.log(last / first, ratio)) + 1)
    return [first * (last / first) ** (i / (count - 1)) for i in range(count)]


def _near(model: LanguageModel, width: int, grain: int) -> LanguageModel | None:
    """The architecture at the nearest valid width; None where none is near."""
    for step in range(9):
        for candidate in dict.fromkeys((width + step * grain, width - step * grain)):
            if candidate > 0:
                try:
                    return resize(model, candidate)
                except ValueError:
                    continue
    return None


def _repeats(config: Config) -> list[Repeat]:
    """The outermost `Repeat`s."""
    if isinstance(config, Repeat):
        return [config]
    return [found for child in config.children().values() for found in _repeats(child)]


def _deepened(config: Config, factor: float) -> Config:
    """With so many times the copies in the outermost `Repeat`s."""
    if isinstance(config, Repeat):
        return dataclasses.replace(config, n=max(1, round(config.n * factor)))
    of = lambda value: (tuple(of(v) for v in value) if isinstance(value, tuple)
                        else _deepened(value, factor) if isinstance(value, Config) else value)
    return dataclasses.replace(config, **{f.name: of(getattr(config, f.name)) for f in dataclasses.fields(config)})
