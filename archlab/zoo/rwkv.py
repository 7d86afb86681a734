"""RWKV-4 (arXiv:2305.13048), RWKV-5 and 6, Eagle and Finch (arXiv:2404.05892), RWKV-7, Goose (arXiv:2503.14456).

Blocks of a time mix and a channel mix, each behind a LayerNorm; one more norms the embedded text. RWKV-7's first layer
hands its values on to all others. Published: RWKV-4 for the Pile (GPT-NeoX's vocabulary), the others as World models.
Tables and heads begin as everywhere here; in the published code with uniform numbers below 1e-4, and orthogonal.
"""

from archlab.layers.config import LayerConfig
from archlab.layers.norms import LayerNorm, Normalise
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Provide, Sequence
from archlab.model import LanguageModel
from archlab.recurrence.rwkv4 import RWKV4, ChannelMix4
from archlab.recurrence.rwkv5 import RWKV5, ChannelMix5
from archlab.recurrence.rwkv6 import RWKV6, ChannelMix6
from archlab.recurrence.rwkv7 import FIRST, RWKV7, ChannelMix7

PILE, WORLD = 50277, 65536


def block(time: LayerConfig, channel: LayerConfig, norm: LayerNorm = LayerNorm()) -> Sequence:
    return Sequence(Residual(time, norm), Residual(channel, norm))


def rwkv4(width: int, depth: int, vocab: int = PILE) -> LanguageModel:
    return assemble(vocab, width, Repeat(block(RWKV4(), ChannelMix4(4 * width)), depth))


def rwkv5(width: int, depth: int, vocab: int = WORLD, **fields) -> LanguageModel:
    """`fields` are those of `RWKV5`."""
    return assemble(vocab, width, Repeat(block(RWKV5(**fields), ChannelMix5(hidden(width))), depth))


def rwkv6(width: int, depth: int, vocab: int = WORLD, **fields) -> LanguageModel:
    """`fields` are those of `RWKV6`."""
    return assemble(vocab, width, Repeat(block(RWKV6(**fields), ChannelMix6(hidden(width))), depth))


def rwkv7(width: int, depth: int, vocab: int = WORLD, **fields) -> LanguageModel:
    """`fields` are those of `RWKV7`, in all layers but the first; at least two layers."""
    one = block(RWKV7(**fields), ChannelMix7(4 * width))
    return assemble(vocab, width, publishing(one), Repeat(one, depth - 1))


def publishing(one: Sequence) -> Provide:
    """RWKV-7's first block, made of one of the others: it takes no values, and hands its own to them."""
    return Provide(FIRST, one.set("layers.0.layer.value_rank", None), trace="layers/0/layer/value")


def assemble(vocab: int, width: int, *blocks: LayerConfig) -> LanguageModel:
    return LanguageModel(vocab, width, Sequence(Normalise(LayerNorm()), *blocks), LayerNorm(), tied=False)


def hidden(width: int) -> int:
    """3.5 D, in whole blocks of 32 channels."""
    return int(3.5 * width) // 32 * 32


CONFIGS = {
    "rwkv4-nano": rwkv4(width=24, depth=2, vocab=256),
    "rwkv4-tiny": rwkv4(width=128, depth=8, vocab=256),
    "rwkv4-small": rwkv4(width=384, depth=5, vocab=512),
    "rwkv4-169m": rwkv4(768, 12),
    "rwkv4-430m": rwkv4(1024, 24),
    "rwkv4-1.5b": rwkv4(2048, 24),
    "rwkv4-3b": rwkv4(2560, 32),
    "rwkv4-7b": rwkv4(4096, 32),
    "rwkv4-14b": rwkv4(5120, 40),
    "rwkv5-nano": rwkv5(width=24, depth=2, vocab=256, head_size=8),
    "rwkv5-tiny": rwkv5(width=128, depth=8, vocab=256, head_size=32),
    "rwkv5-small": rwkv5(width=384, depth=5, vocab=512),
    "rwkv5-0.4b": rwkv5(1024, 24),
    "rwkv5-1.5b": rwkv5(2048, 24),
    "rwkv5-3b": rwkv5(2560, 32),
    "rwkv5-7b": rwkv5(4096, 32),
    "rwkv6-nano": rwkv6(width=24, depth=2, vocab=256, head_size=8, mix_rank=4, decay_rank=4),
    "rwkv6-tiny": rwkv6(width=128, depth=8, vocab=256, head_size=32, mix_rank=8, decay_rank=16),
    "rwkv6-small": rwkv6(width=384, depth=5, vocab=512),
    "rwkv6-1.6b": rwkv6(2048, 24),
    "rwkv6-3b": rwkv6(2560, 32),
    "rwkv6-7b": rwkv6(4096, 32, mix_rank=64, decay_rank=128),
    "rwkv6-14b": rwkv6(4096, 61, mix_rank=64, decay_rank=128),
    "rwkv7-nano": rwkv7(width=24, depth=2, vocab=256, head_size=8, decay_rank=4, rate_rank=4, value_rank=4,
                        gate_rank=4),
    "rwkv7-tiny": rwkv7(width=128, depth=8, vocab=256, head_size=32, decay_rank=16, rate_rank=16, value_rank=8,
                        gate_rank=16),
    "rwkv7-small": rwkv7(width=384, depth=5, vocab=512, decay_rank=32, rate_rank=32, gate_rank=64),
    "rwkv7-0.1b": rwkv7(768, 12),
    "rwkv7-0.4b": rwkv7(1024, 24),
    "rwkv7-1.5b": rwkv7(2048, 24, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=256),
    "rwkv7-2.9b": rwkv7(2560, 32, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=320),
}
