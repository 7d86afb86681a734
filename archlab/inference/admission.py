"""What depth-wise decoding takes: models with one recursion in the middle, and requests that fit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from archlab.depth.mixture_of_recursions import MixtureOfRecursions
from archlab.layers.alphabet import variables_of
from archlab.layers.contract import Tokens
from archlab.layers.sequence import Sequence, SequenceModule
from archlab.model import LanguageModel, Model

PROMPT = 16  # the shortest prompt that a program is compiled for
BATCH = 7919  # of a state whose shapes alone are looked at: a number that no layer has


class Request(NamedTuple):
    """prompt: token ids, at least one. new_tokens: how many to add."""

    prompt: Any
    new_tokens: int


def admitted(number: int, request: Request | tuple, vocab: int,
             max_length: int) -> tuple[np.ndarray, np.int32, np.int32]:
    """The prompt padded to a power of two, its length, and how many tokens to add. Raises: ValueError, which names the
    request by its number in the queue."""
    if not isinstance(request, tuple) or len(request) != 2:
        raise ValueError(f"request {number}, {request!r}: must be a prompt and how many tokens to add")
    prompt, new = np.asarray(request[0]), request[1]
    if prompt.ndim != 1 or not prompt.size or prompt.dtype.kind not in "iu":
        raise ValueError(f"request {number}: a prompt of shape {prompt.shape} and type {prompt.dtype}: must be whole "
                         "numbers [P], one at the least")
    if prompt.min() < 0 or prompt.max() >= vocab:
        raise ValueError(f"request {number}: a prompt with ids from {prompt.min()} to {prompt.max()}: must lie in "
                         f"[0, {vocab})")
    if not isinstance(new, (int, np.integer)) or new < 1 or prompt.size + new > max_length:
        raise ValueError(f"request {number}: new_tokens = {new!r}: must be at least 1, and with the {prompt.size} of "
                         f"the prompt at most max_length = {max_length}")
    padding = min(max(PROMPT, 1 << (prompt.size - 1).bit_length()), max_length) - prompt.size
    return np.pad(prompt, (0, padding)).astype(np.int32), np.int32(prompt.size), np.int32(new)


def find_recursion(model: Model, max_length: int) -> int | None:
    """Where in the body's `Sequence` the recursion is; None where it is the body.

    Raises: ValueError for models whose tokens cannot share a batch at different recursions.
    """
    body = getattr(model.config, "body", None)
    layers = body.layers if isinstance(body, Sequence) else (body,)
    found = [i for i, layer in enumerate(layers) if isinstance(layer, MixtureOfRecursions)]
    if not isinstance(model.config, LanguageModel) or len(found) != 1:
        raise ValueError("depth-wise decoding wants a language model whose body is one MixtureOfRecursions, or a "
                         f"Sequence with one among its layers: not {type(body).__name__} with {len(found)}")
    if not body.causal:
        raise ValueError("depth-wise decoding: the model sees both ways, so it has no next token to give")
    middle = found[0] if isinstance(body, Sequence) else None
    before, mixture, after = around_recursion(model.body, middle)
    for path, variable in variables_of(mixture.unit).items():
        if variable.get_metadata().get("own", False):
            raise ValueError(f"depth-wise decoding: each recursion owns its {path}, so that different recursions "
                             "cannot share a batch")
    one = jnp.ones((1, 1), jnp.int32)
    x = jax.ShapeDtypeStruct((1, 1, model.config.width), model.compute_dtype)
    for layer in (*before, *after):
        if published := jax.eval_shape(lambda x: layer(x, Tokens(one, one))[2], x).provides:
            raise ValueError(f"depth-wise decoding: values published for later layers ({', '.join(published)}) do not "
                             "stay with their token")
    state = jax.eval_shape(lambda: model.init_state(BATCH, max_length).body)
    if any(leaf.shape[0] != BATCH for leaf in jax.tree.leaves(state)):
        raise ValueError("depth-wise decoding: states are stacked over the copies of a Repeat: give it scan=False")
    return middle


def around_recursion(body, middle: int | None):
    """What is before the recursion, itself, and what is behind: of a body, or of its state."""
    if middle is None:
        return (), body, ()
    parts = tuple(body.layers) if isinstance(body, SequenceModule) else body
    return parts[:middle], parts[middle], parts[middle + 1:]
