"""archlab: language-model architectures written once, readably, and compared fairly.

    model = archlab.create_model("mamba-tiny", rngs=nnx.Rngs(0))
    out = model(ids)                      # ids [B, T] ints; out.logits [B, T, V]

Everything else is reached by module: archlab.layers, attention, recurrence, experts, depth, zoo, data, training,
inference, parallel, analysis.
"""

from archlab.analysis.accounts import profile
from archlab.inference.generation import generate
from archlab.training.saving import load, save
from archlab.zoo import create_model, get_config, list_models

__version__ = "0.1.0"
__all__ = ["create_model", "generate", "get_config", "list_models", "load", "profile", "save"]
