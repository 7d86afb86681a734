"""Checkpoints of the Hugging Face world: folders of config.json and safetensors, read and written.

A family is one short file of `families/`, found by itself: how its config.json becomes a `LanguageModel` and back, and
what its tensors are called. The rest is here once, and uses no transformers and no torch.
"""

from archlab.hub.checkpoint import is_huggingface, load, save
from archlab.hub.text import load_text

__all__ = ["is_huggingface", "load", "load_text", "save"]
