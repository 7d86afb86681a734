"""The models of the tasks: every sequence mixer in the same small network.

A mixer stands where attention stands in a Transformer: `Repeat(Sequence(Residual(mixer), Residual(MLP)), depth)`, or
without the MLP where a task's published setting has none. So whatever two models differ in is the mixer.
"""

import functools
import hashlib
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from archlab.attention.attention import Attention
from archlab.attention.linear import LinearAttention
from archlab.data.tasks import Compression, Task
from archlab.layers.alphabet import parameter
from archlab.layers.config import LayerConfig, near, require
from archlab.layers.contract import Aux, Layer, Place, Tokens
from archlab.layers.mlp import SwiGLU
from archlab.layers.positions import SinusoidalPositions
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.recurrence.delta_net import DeltaNet
from archlab.recurrence.gated_delta_net import GatedDeltaNet
from archlab.recurrence.gla import GatedLinearAttention
from archlab.recurrence.h3 import H3
from archlab.recurrence.hgrn2 import HGRN2, LowerBounds
from archlab.recurrence.hyena import Hyena
from archlab.recurrence.lightning import LightningAttention
from archlab.recurrence.mamba import Mamba
from archlab.recurrence.mamba2 import Mamba2
from archlab.recurrence.mamba3 import Mamba3
from archlab.recurrence.min_gru import MinGRU
from archlab.recurrence.mlstm import MLSTM
from archlab.recurrence.retention import Retention
from archlab.recurrence.rg_lru import RGLRU
from archlab.recurrence.rwkv4 import RWKV4
from archlab.recurrence.rwkv5 import RWKV5
from archlab.recurrence.rwkv6 import RWKV6
from archlab.recurrence.rwkv7 import RWKV7
from archlab.recurrence.s4 import S4
from archlab.recurrence.s4d import S4D
from archlab.recurrence.s5 import S5
from archlab.recurrence.slstm import SLSTM
from experiments import common

LONGEST = 16384  # tokens, for the one mixer that must know


def mixers(width: int, longest: int = LONGEST) -> dict[str, LayerConfig]:
    """{name: mixer} for a stream of `width` channels, a multiple of 16, and texts of up to `longest` tokens. Heads have
    32 channels (a stream of 16: 16), in keys and in values; all else is as the family's authors have it."""
    size = min(32, width)
    heads = width // size
    delta = dict(heads=heads, key_size=size, value_size=size)
    goose = dict(head_size=size, decay_rank=8, rate_rank=8, gate_rank=16, value_rank=None)
    return {
        "attention": Attention(heads),
        "attention-absolute": Attention(heads, positions=None),
        "linear-attention": LinearAttention(heads),
        "lightning": LightningAttention(heads),
        "retention": Retention(heads),
        "gla": GatedLinearAttention(heads, key_size=size, value_size=size),
        "hgrn2": HGRN2(heads),
        "s4": S4(),
        "s4d": S4D(),
        "s5": S5(),
        "h3": H3(),
        "hyena": Hyena(longest),
        "mamba": Mamba(),
        "mamba-negative": Mamba(negative=True),
        "mamba2": Mamba2(state=32, head_size=size),
        "mamba3": Mamba3(state=32, head_size=size),
        "rg-lru": RGLRU(heads),
        "min-gru": MinGRU(),
        "delta-net": DeltaNet(**delta),
        "delta-net-negative": DeltaNet(**delta, negative=True),
        "gated-delta-net": GatedDeltaNet(**delta),
        "gated-delta-net-negative": GatedDeltaNet(**delta, negative=True),
        "rwkv4": RWKV4(),
        "rwkv5": RWKV5(head_size=size),
        "rwkv6": RWKV6(head_size=size, mix_rank=8, decay_rank=8),
        "rwkv7": RWKV7(**goose),
        "rwkv7-negative": RWKV7(**goose, negative=True),
        "mlstm": MLSTM(heads),
        "slstm": SLSTM(heads),
    }


def own_mixer(file: str, width: int) -> LayerConfig:
    """The mixer of a Python file of one's own: its `mixer(width)`, or its `MIXER`, the same at every width. ValueError
    where that is no layer config, or one that sees later tokens: in many tasks these are the answers."""
    module = _own(file)[0]
    found = module.mixer(width) if callable(getattr(module, "mixer", None)) else getattr(module, "MIXER", None)
    if not isinstance(found, LayerConfig):
        raise ValueError(f"{file} must define MIXER, a layer config, or mixer(width), which returns one")
    if not found.causal:
        raise ValueError(f"{file}: {found} is not causal, and could read answers off the later tokens")
    return found


def own_code(mixer: str) -> list[str]:
    """What tells a file of one's own from what it was before a change; nothing for a named mixer."""
    return [_own(mixer)[1]] if mixer.endswith(".py") else []


@functools.cache
def _own(file: str):
    """(module, SHA-256): a file is run once."""
    module = common.run_file(Path(file))
    return module, hashlib.sha256(Path(file).read_bytes()).hexdigest()


def task_model(mixer: str, task: Task, width: int, depth: int, mlp: bool = True) -> LanguageModel:
    """The network of a mixer, by name or a Python file (`own_mixer`), for a task. mlp: a gated MLP of twice the width
    behind each mixer.

    ValueError for an unknown mixer, and where it cannot stand in a stream of this width.
    """
    known = mixers(width, max(test.context for test in (task, *task.tests().values())))
    if mixer not in known and not mixer.endswith(".py"):
        raise ValueError(f"no mixer named {mixer!r} (one of your own is a Python file, NAME.py, with MIXER or "
                         f"mixer(width): docs/tasks.md); {near(mixer, list(known))}")
    chosen = own_mixer(mixer, width) if mixer.endswith(".py") else known[mixer]
    block = Sequence(Residual(chosen), Residual(SwiGLU(2 * width))) if mlp else Residual(chosen)
    layers: list[LayerConfig] = [Repeat(block, depth)]
    before = {"attention-absolute": SinusoidalPositions(scale=width**-0.5), "hgrn2": LowerBounds()}
    if mixer in before:
        layers.insert(0, before[mixer])
    if isinstance(task, Compression):
        layers += [Bottleneck(task.length), Residual(SwiGLU(4 * width)), Residual(SwiGLU(4 * width))]
    return LanguageModel(task.vocab, width, layers[0] if len(layers) == 1 else Sequence(*layers))


class Bottleneck(LayerConfig):
    """What comes after the first `length` tokens of a document sees these through one vector, that of the last of them,
    and its own place: the join of MAD's auto-encoder (Poli et al. 2024, arXiv:2403.17844)."""

    length: int

    def __post_init__(self):
        require(self.length >= 1, self, "length", "must be at least 1")

    def build(self, rngs: nnx.Rngs, at: Place) -> "BottleneckModule":
        return BottleneckModule(self, rngs, at)


class BottleneckModule(Layer):
    """Weight: places [length, D], a vector for each place behind. Of rows of one document; it keeps no state."""

    def __init__(self, config: Bottleneck, rngs: nnx.Rngs, at: Place):
        self.places = parameter(rngs, "->.D", (config.length, at.width), nnx.initializers.normal(1.0))

    def __call__(self, x, tokens: Tokens, state=None):
        length = self.places.shape[0]
        behind = tokens.positions - length
        place = jnp.take(self.places[...], behind.clip(0, length - 1), axis=0).astype(x.dtype)
        return jnp.where((behind >= 0)[:, :, None], x[:, length - 1:length] + place, x), None, Aux()
