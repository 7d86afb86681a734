"""What the sparse, linear and low-rank forms of attention share: the projections of `Attention`, and its positions."""

from archlab.attention.attention import Attention, AttentionModule
from archlab.attention.positions import Positions, Rotary
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Place


class HeadsConfig(LayerConfig):
    """Base of the forms of causal attention that have queries, keys and values, but not all pairs of them.

    heads: H. kv_heads: G, which divides H; None for H. head_size: K; None for D / H. positions: those that turn queries
    and keys, such as Rotary(); None for none.
    """

    heads: int
    kv_heads: int | None = None
    head_size: int | None = None
    positions: Positions | None = Rotary()

    def __post_init__(self):
        turns = self.positions is None or type(self.positions).bias is Positions.bias
        require(turns, self, "positions", "there is no matrix of scores to add a bias to: must turn queries and keys, "
                "as Rotary() does, or be None")
        self.projections  # raises ValueError for what is no attention

    @property
    def projections(self) -> Attention:
        """The attention whose queries, keys, values and output these are."""
        return Attention(self.heads, self.kv_heads, self.head_size, self.positions)

    def check(self, width: int) -> None:
        self.projections.check(width)


class HeadsModule(AttentionModule):
    """The weights of `Attention`. `self.form` is the config of the form; `self.config` that of the projections."""

    def __init__(self, form: HeadsConfig, rngs, at: Place):
        super().__init__(form.projections, rngs, at)
        self.form = form
