"""What chooses the tokens of a recursion or a block: the base of such routers, and what one says.

docs/depth.md has a router of one's own.
"""

from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from archlab.layers.config import Config
from archlab.layers.contract import Place


class Choice(NamedTuple):
    """chosen [B, T], of the candidates; gate [B, T], what their output is multiplied by; passed [B]: tokens chosen so
    far of the row's last document; loss: what teaches the router; agreement: the share of candidates for whom its
    causal rule and its look ahead agree, None where it did not look ahead."""

    chosen: Bool[Array, "B T"]
    gate: Float[Array, "B T"]
    passed: Int[Array, "B"]
    loss: Float[Array, ""] | float = 0.0
    agreement: Float[Array, ""] | None = None


class TokenRouter(Config):
    """Base of the routers that choose tokens.

    Its module is called as `(x [B, T, D], candidates [B, T], share, room, places [B, T], tokens, passed [B],
    look_ahead)` and gives a `Choice`. share: of a row's tokens, that a look ahead chooses; room: of a document's tokens
    so far, at most, that pass causally (both exact fractions); places: of each token in its document, counted from 0;
    passed: of the row's last document, before this piece. Without `look_ahead` the choice must be causal, and within
    the budget of `room`: `routing.choose_within_budget` sees to that. With it, no more than `routing.budget(share, T)`
    of a row may be chosen, but before step `warmup` of training.

    looks_ahead: whether the training form does.
    """

    looks_ahead = True
    warmup = 0

    def build(self, rngs: nnx.Rngs, at: Place) -> nnx.Module:
        """The module, for the recursion or the block that begins at this place."""
        raise TypeError(f"{type(self).__name__} does not say how it is built")
