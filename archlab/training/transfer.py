"""Learning rates tuned on a small model, carried over to a wider or deeper one.

Width: the maximal update parametrisation (Yang et al. 2022, Tensor Programs V, arXiv:2203.03466, tables 3 and 8); for
Muon the spectral condition (Yang et al. 2023, arXiv:2310.17813). Depth: CompleteP (Dey et al. 2025, arXiv:2505.01618).

    base = transformer(width=64, ...)                              # where the learning rate was tuned
    model = transfer(transformer(width=512, ...), base)            # what the forward pass needs
    optimizer = Optimizer(learning_rate=tuned, base=base)          # what the updates need

Nothing here knows an architecture. A parameter's letters say over which axes it sums, and its shape beside that of the
same parameter in the base says how many times longer these have become.
"""

import math

from flax import nnx

from archlab.layers.alphabet import is_matrix, parameters_of
from archlab.layers.config import Config
from archlab.layers.positions import SinusoidalPositions
from archlab.layers.residual import Residual
from archlab.model import LanguageModel
from archlab.training.factored import matrix_axes
from archlab.training.step import abstract


def transfer(config: LanguageModel, base: LanguageModel, depth_power: float = 1.0) -> LanguageModel:
    """`config` with the multipliers by which the learning rate of `base` is right for it, too.

    Width, m times that of the base: the tables over the vocabulary are drawn with entries of D^-1/2, and their rate
    falls by m^1/2 (`rates`). With the look-up multiplied by m^1/2 the stream begins as in the base, whatever the width;
    with the logits multiplied by m^-1/2 the head is what the paper wants: smaller by m than the look-up's entries. That
    holds for tied and untied tables alike. Attention scores go by 1/K where heads have grown, q . k being no longer
    random after training.

    Depth, l times that of the base: what a branch adds is multiplied by l^-p, p = depth_power, its rate by l^(p - 1),
    and its output is drawn as in the base: the multiplier stands in for our initialisers' division by the depth.
    p: 1 (CompleteP), 1/2 (Yang et al. 2023, arXiv:2310.02244), or 0, which leaves depth as it is without transfer.

    Multipliers are those of the base times a ratio, so that transfer to the base itself changes nothing, and twice is
    once. Raises: ValueError where the two are different architectures; it names what differs.
    """
    if not (depth_power == 0 or 0.5 <= depth_power <= 1):
        raise ValueError(f"transfer: depth_power = {depth_power!r}: must be from 0.5 to 1, or 0 to leave depth alone")
    places, others = dict(config.walk()), dict(base.walk())
    _same(_kinds(places), _kinds(others), "configs")
    _same(_words(parameters_of(abstract(config))), _words(parameters_of(abstract(base))), "parameters")
    wider = math.sqrt(config.width / base.width)
    changes = {"embedding_scale": base.embedding_scale * wider, "logit_scale": base.logit_scale / wider}
    found = False
    for path, place in places.items():
        was, at = others[path], path + "."
        if isinstance(place, Residual) and depth_power:
            side = path.split(".")[0]  # "body", or "encoder"
            before = getattr(base, side).branches
            deeper, found = getattr(config, side).branches / before, True
            spread = was.spread if deeper == 1 else was.spread or before
            changes |= {at + "scale": was.scale * deeper**-depth_power, at + "spread": spread,
                        at + "rate": was.rate * deeper ** (depth_power - 1)}
        elif isinstance(place, SinusoidalPositions):
            changes[at + "scale"] = was.scale  # beside embeddings that no longer shrink with the width
        elif hasattr(place, "head_size") and hasattr(place, "scale"):
            now, then = (c.head_size or whole.width // c.heads for c, whole in ((place, config), (was, base)))
            changes[at + "scale"] = was.scale if now == then else (was.scale or then**-0.5) * then / now
    if depth_power and not found and config.body.branches != base.body.branches:
        raise ValueError("transfer: there is no Residual whose branch could be scaled: give depth_power=0")
    for path, value in changes.items():
        config = config.set(path, value)
    return config


def rates(parameters: dict[str, nnx.Param], base: LanguageModel, name: str = "adamw") -> dict[str, float]:
    """{path: what the parameter's learning rate is multiplied with}, for the rate tuned at `base`.

    Of updates whose entries have a given size, as those of Adam and Adafactor have: 1/n for what sums over n times as
    many inputs (matrices, routers, gates; L and E count as copies), 1 for what sums over none that have grown (gains,
    biases, convolutions). Tables over the vocabulary: m^-1/2 at m times the width; see `transfer`. A bias over it:
    m^1/2, as logits are multiplied by m^-1/2.

    Muon's updates of matrices have singular values of sqrt(max(rows, columns)) as we scale them, and the spectral
    condition wants sqrt(columns / rows): m^-1/2 where both have grown.

    Args: parameters: {path: nnx.Param}, real or abstract. base: the model at which the rate was tuned. name: of the
      optimizer. Raises: ValueError naming paths where these are the parameters of another architecture.
    """
    known = parameters_of(abstract(base))
    _same(_words(parameters), _words(known), "parameters")
    table = "embed/table"
    wider = math.sqrt(parameters[table].shape[1] / known[table].shape[1])

    def rate(path: str) -> float:
        letters = parameters[path].letters
        if "V" in letters:
            return 1 / wider if "D" in letters else wider
        rows, columns = (math.prod(parameters[path].shape[axis] / known[path].shape[axis] for axis in axes)
                         for axes in matrix_axes(letters))
        if name == "muon" and is_matrix(letters):
            return math.sqrt(columns / rows) / (_longer(parameters[path]) / _longer(known[path]))
        return 1 / rows

    return {path: rate(path) for path in parameters}


def _kinds(places: dict[str, Config]) -> set[str]:
    return {f"{path} ({type(place).__name__})" for path, place in places.items()}


def _words(parameters: dict[str, nnx.Param]) -> set[str]:
    return {f"{path} ({weight.letters})" for path, weight in parameters.items()}


def _same(ours: set[str], theirs: set[str], what: str) -> None:
    """ValueError where these are not the same, with the first of those that only one side has."""
    if ours != theirs:
        listed = lambda names: ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "") or "none"
        raise ValueError(f"base: it must be the same architecture at another size. {what.capitalize()} that only the "
                         f"model has: {listed(ours - theirs)}; that only the base has: {listed(theirs - ours)}")


def _longer(weight: nnx.Param) -> float:
    """The root of the longer side of a matrix."""
    return math.sqrt(max(math.prod(weight.shape[axis] for axis in axes) for axes in matrix_axes(weight.letters)))
