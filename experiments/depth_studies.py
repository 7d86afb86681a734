"""The studies of adaptive depth, as data: for each its models, how long they train, and what is expected of them.

Blocks are the same everywhere (pre-norm, rotary attention, SwiGLU); a study's models differ in how often a token passes
through which. Within a study all read the same text in the same order, and get the same learning rates to try.
"""

import dataclasses
import functools

from archlab.analysis.accounts import profile
from archlab.attention.attention import Attention
from archlab.data.tasks import Addition, Copying, Task
from archlab.depth import sharing
from archlab.depth.coordinates import Coordinates
from archlab.depth.depth_choice import DepthChoice
from archlab.depth.halting import ACT
from archlab.depth.mixture_of_depths import MixtureOfDepths
from archlab.depth.mixture_of_recursions import MixtureOfRecursions
from archlab.depth.recur import Recur
from archlab.depth.top_tokens import RandomTokens, TopTokens
from archlab.experts.balance import SwitchLoss
from archlab.layers.config import LayerConfig
from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Size:
    """A budget. Text: width D, heads H and hidden F of a block; steps of rows x context bytes. Tasks: the same of (f),
    and the longest string or number that is trained. rates: that every model tries, with seed 0."""

    width: int
    heads: int
    hidden: int
    steps: int
    rows: int
    context: int
    eval_batches: int
    task_width: int
    task_steps: int
    task_rows: int
    length: int
    rates: tuple[float, ...]
    seeds: int


SIZES = {
    "quick": Size(16, 2, 32, steps=4, rows=2, context=32, eval_batches=2, task_width=16, task_steps=4, task_rows=4,
                  length=3, rates=(3e-3,), seeds=2),
    "cpu": Size(96, 3, 256, steps=300, rows=8, context=128, eval_batches=32, task_width=64, task_steps=600,
                task_rows=32, length=10, rates=(2e-3, 4e-3), seeds=3),
}


WEIGHT = 0.1  # of what teaches the causal rule: with the published 0.001 some hundred steps do not calibrate it


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model of a study. steps: of training. always, routed: a token passes `always` blocks, and `routed` more for
    each unit of depth that the routers give it. task: what it learns; None for text."""

    model: LanguageModel
    steps: int
    always: int = 0
    routed: int = 0
    task: Task | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """arms: by name. claims: pairs of names, of which the first is expected to be better."""

    arms: dict[str, Arm]
    claims: tuple[tuple[str, str], ...]


def block(heads: int, hidden: int) -> LayerConfig:
    """The block of all models."""
    return Sequence(Residual(Attention(heads)), Residual(SwiGLU(hidden)))


def text_model(size: Size, body: LayerConfig) -> LanguageModel:
    """A model of bytes."""
    return LanguageModel(256, size.width, body)


def vanilla(size: Size, depth: int, steps: int | None = None) -> Arm:
    """So many blocks, each with weights of its own."""
    return Arm(text_model(size, Repeat(block(size.heads, size.hidden), depth)), steps or size.steps, always=depth)


def recursions(size: Size, n: int, router: TopTokens | DepthChoice = TopTokens(weight=WEIGHT),
               cache: str = "recursion") -> Arm:
    """Mixture-of-Recursions: a block, two blocks up to n times, a block. Four unique blocks, up to 2 + 2n deep."""
    one = block(size.heads, size.hidden)
    body = Sequence(one, MixtureOfRecursions(Sequence(one, one), n, router=router, cache=cache), one)
    return Arm(text_model(size, body), size.steps, always=2, routed=2)


def depths(size: Size, router: TopTokens | RandomTokens) -> Arm:
    """Mixture-of-Depths: eight blocks, every second for 12.5% of the tokens."""
    one = block(size.heads, size.hidden)
    body = Repeat(Sequence(one, MixtureOfDepths(one, 0.125, router)), 4)
    return Arm(text_model(size, body), equal_steps(size, text_model(size, body)), always=4, routed=1)


@functools.cache
def training_flops(model: LanguageModel, context: int) -> float:
    """Of a token, forward and backward in the training form."""
    return profile(model, context).training.total


def equal_steps(size: Size, model: LanguageModel) -> int:
    """Steps in which a model spends the training FLOPs of the Mixture-of-Recursions of (a)."""
    spent = size.steps * training_flops(recursions(size, 3).model, size.context)
    return max(1, round(spent / training_flops(model, size.context)))


def equal_parameters(size: Size) -> Study:
    """Equal unique parameters: what recursion adds to four blocks.

    Vanilla passes them once. With n recursions the middle two may be passed n times; capacities n/n ... 1/n make that
    4, 2 + 2 (1 + 1/2) = 5 and 2 + 2 (1 + 2/3 + 1/3) = 6 blocks a token, so that more recursions cost more FLOPs.

    Expected: more recursions, lower loss (arXiv:2507.10524, table 8, 118M: NLL 2.9678, 2.9205, 2.9111).
    """
    arms = {"vanilla, 4 blocks": vanilla(size, 4), "MoR, 2 recursions": recursions(size, 2),
            "MoR, 3 recursions": recursions(size, 3)}
    return Study(arms, (("MoR, 2 recursions", "vanilla, 4 blocks"), ("MoR, 3 recursions", "MoR, 2 recursions")))


def sharing_order(size: Size) -> Study:
    """Order of sharing weights: six layers, two recursions of all or of the middle four, no routing.

    All cost the same. Cycle and sequence have 6 / 2 = 3 unique blocks, the middle patterns 2 + 4 / 2 = 4: as published,
    it is the depth that is equal, and not the parameters.

    Expected: middle-cycle best (arXiv:2507.10524, 135M: cycle 3.1154, sequence 3.1637, middle-cycle 3.1048,
    middle-sequence 3.1602).
    """
    patterns = {"cycle": sharing.cycle, "sequence": sharing.sequence, "middle-cycle": sharing.middle_cycle,
                "middle-sequence": sharing.middle_sequence}
    one = block(size.heads, size.hidden)
    arms = {name: Arm(text_model(size, pattern(one, 6, 2)), size.steps, always=6) for name, pattern in patterns.items()}
    return Study(arms, tuple(("middle-cycle", name) for name in arms if name != "middle-cycle"))


def routing(size: Size) -> Study:
    """Routing and caching: Mixture-of-Recursions with three recursions, one thing changed at a time.

    Expected: expert choice better than token choice (arXiv:2507.10524, table 4: 2.8667 against 2.9358), the auxiliary
    loss better than the auxiliary router (2.8893), own keys slightly better than shared ones (table 3: 2.7925 against
    2.7983). Of token choice, the loss of balance is better, and a steered bias no worse in balance.
    """
    arms = {"expert choice, auxiliary loss": recursions(size, 3),
            "expert choice, auxiliary router": recursions(size, 3, TopTokens(causal="predictor", weight=WEIGHT)),
            "expert choice, shared keys": recursions(size, 3, cache="shared"),
            "token choice, loss of balance": recursions(size, 3, DepthChoice(losses=(SwitchLoss(0.1),))),
            "token choice, steered bias": recursions(size, 3, DepthChoice(losses=(), balance_rate=0.001))}
    first = "expert choice, auxiliary loss"
    return Study(arms, tuple((first, name) for name in arms if name != first))


def equal_flops(size: Size) -> Study:
    """Equal training FLOPs: Mixture-of-Recursions against as many blocks as it is deep at most, 2 + 2 * 3 = 8.

    A token of MoR passes 6 of 8 blocks, so that it reads about 8/6 times the text of the others; steps are such that
    FLOPs agree to half a step. Without routing: the same recursion, all tokens through all of it.

    Expected: vanilla wins at this scale, as the paper says of 135M; MoR is better than recursion without routing.
    """
    one = block(size.heads, size.hidden)
    full = text_model(size, sharing.middle_cycle(one, 8, 3))
    deep = vanilla(size, 8).model
    arms = {"vanilla, 8 blocks": vanilla(size, 8, equal_steps(size, deep)),
            "recursion without routing": Arm(full, equal_steps(size, full), always=8),
            "MoR, 3 recursions": recursions(size, 3)}
    return Study(arms, (("vanilla, 8 blocks", "MoR, 3 recursions"),
                        ("MoR, 3 recursions", "recursion without routing")))


def mixture_of_depths(size: Size) -> Study:
    """Mixture-of-Depths: every second of eight blocks for 12.5% of the tokens, against the dense eight at equal FLOPs.

    A token passes 4 + 4 / 8 = 4.5 of 8 blocks: about 8 / 4.5 times the steps of the dense model.

    Expected: MoD at least as good as dense (arXiv:2404.02258, figures 3 and 4), random routing much worse than a
    learned one; the predictor is right about more than 97% of the tokens.
    """
    deep = vanilla(size, 8).model
    arms = {"dense, 8 blocks": vanilla(size, 8, equal_steps(size, deep)),
            "MoD, predictor": depths(size, TopTokens("linear", "predictor", WEIGHT)),
            "MoD, auxiliary loss": depths(size, TopTokens("linear", "loss", WEIGHT)),
            "MoD, random": depths(size, RandomTokens())}
    return Study(arms, (("MoD, predictor", "dense, 8 blocks"), ("MoD, predictor", "MoD, random"),
                        ("MoD, auxiliary loss", "MoD, random")))


def universal_transformer(size: Size) -> Study:
    """The Universal Transformer with ACT: strings and sums longer than it was trained on.

    Six steps of one block, all of them or until halting, against six blocks with weights of their own: equal depth, and
    six times the parameters for the latter. Rows of 1 to n letters or digits; tested on n, 2n and 4n.

    As in the paper, the last model knows places from its coordinates alone, which in training begin anywhere.

    Expected: better than the Transformer beyond the trained length (arXiv:1807.03819, table 4, ten times the length:
    copy .91 against .53, reverse .96 against .13, addition .34 against .07 of the symbols), and more steps where there
    is more to compute.
    """
    one, steps, arms, claims = block(2, 2 * size.task_width), 6, {}, []
    placeless = Sequence(Residual(Attention(2, positions=None)), Residual(SwiGLU(2 * size.task_width)))
    bodies = {"Transformer": Repeat(one, steps), "UT, six steps": Recur(one, steps, Coordinates()),
              "UT, ACT": Recur(one, steps, Coordinates(), ACT()),
              "UT, ACT, offsets": Recur(placeless, steps, Coordinates(offset=8 * size.length), ACT())}
    tasks = {"copy": Copying(10, 1, size.length), "reverse": Copying(10, 1, size.length, backwards=True),
             "addition": Addition(10, 1, size.length)}
    for label, task in tasks.items():
        for name, body in bodies.items():
            model = LanguageModel(task.vocab, size.task_width, body)
            halts = "ACT" in name
            arms[f"{label}: {name}"] = Arm(model, size.task_steps, 0 if halts else steps, int(halts), task)
        claims += [(f"{label}: {name}", f"{label}: Transformer") for name in ("UT, ACT", "UT, ACT, offsets")]
    return Study(arms, tuple(claims))


STUDIES = {"a": equal_parameters, "b": sharing_order, "c": routing, "d": equal_flops, "e": mixture_of_depths,
           "f": universal_transformer}
