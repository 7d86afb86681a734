"""xLSTM (arXiv:2405.04517) and xLSTM 7B (arXiv:2503.13427).

xLSTM[1:0] has mLSTM blocks only, each a branch of its own; in xLSTM[7:1] every eighth block is an sLSTM followed by a
gated MLP of 1.3 times the width, rounded up to a multiple of 64 (section 2.4 says 4/3). The published sizes are those
of table 1, with GPT-2's vocabulary rounded up; where the sLSTM blocks stand changes no size.
"""

from archlab.layers.mlp import MLP, SwiGLU
from archlab.layers.norms import LayerNorm
from archlab.layers.repeat import Repeat, stack
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.mlstm import MLSTM
from archlab.recurrence.mlstm_large import MLSTMLarge
from archlab.recurrence.slstm import SLSTM

NORM = LayerNorm(bias=False)


def xlstm(width: int, depth: int, heads: int = 4, pattern: str = "m", vocab: int = 256) -> LanguageModel:
    """`depth` blocks, m an mLSTM or s an sLSTM, as `pattern` says over and over."""
    hidden = up_to(64, 1.3 * width)
    blocks = {"m": Residual(MLSTM(heads), NORM),
              "s": Sequence(Residual(SLSTM(heads), NORM), Residual(MLP(hidden, "gelu", gated=True), NORM))}
    body = stack([blocks[pattern[i % len(pattern)]] for i in range(depth)])[0]
    return LanguageModel(vocab, width, body, NORM, tied=False)


def xlstm_large(width: int, depth: int, heads: int, vocab: int = 256) -> LanguageModel:
    """xLSTM 7B's blocks: an mLSTM without convolution, and a gated MLP of 8/3 of the width."""
    block = Sequence(Residual(MLSTMLarge(heads)), Residual(SwiGLU(up_to(64, 2.667 * width))))
    return LanguageModel(vocab, width, Repeat(block, depth), tied=False, logit_cap=30.0)


def up_to(multiple: int, size: float) -> int:
    """`size` rounded up to a multiple."""
    return int(-(-size // multiple) * multiple)


SEVEN_TO_ONE = "mmmmmmms"
CONFIGS = {
    "xlstm-7-1-nano": xlstm(24, 2, heads=2, pattern="ms"),
    "xlstm-7-1-tiny": xlstm(128, 8, pattern=SEVEN_TO_ONE),
    "xlstm-7-1-small": xlstm(320, 14, pattern=SEVEN_TO_ONE, vocab=512),
    "xlstm-1-0-tiny": xlstm(128, 8),
    "xlstm-1-0-small": xlstm(320, 14, vocab=512),
    "xlstm-large-nano": xlstm_large(24, 2, heads=2),
    "xlstm-large-tiny": xlstm_large(128, 6, heads=4),
    "xlstm-large-small": xlstm_large(384, 6, heads=4, vocab=512),
    "xlstm-1-0-350m": xlstm(1024, 48, vocab=50304),
    "xlstm-7-1-350m": xlstm(1024, 48, pattern=SEVEN_TO_ONE, vocab=50304),
    "xlstm-7b": xlstm_large(4096, 32, heads=8, vocab=50304),
}
