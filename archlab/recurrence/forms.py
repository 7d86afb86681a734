"""The forms in which a recurrence can be computed. All give the same numbers; they differ in time and memory.

A recurrence of this room takes `form=None` and then chooses by platform and shape; `form=Chunked(32)` overrides it.
One token, a decode step, is always one step of the recurrence itself.
"""

import functools
from collections.abc import Callable

import jax

from archlab.layers.config import Config, require


class Form(Config):
    """How a recurrence is computed: `Sequential()`, `Associative()`, `Chunked(size)` or `Kernel(size)`."""


class Sequential(Form):
    """Step by step (`lax.scan`): the definition. Its gradient keeps every state."""


class Associative(Form):
    """All steps at once, in a tree of log2(T) levels (`lax.associative_scan`). For diagonal recurrences only."""


class Chunked(Form):
    """`size` steps at once, by products of matrices; only the states between chunks are kept for the gradient."""

    size: int = 64

    def __post_init__(self):
        require(self.size >= 1, self, "size", "must be at least 1")


class Kernel(Form):
    """`Chunked`, in one Pallas kernel that keeps a chunk on the chip. size: a power of 2. interpret: run without a GPU
    or TPU, for tests."""

    size: int = 64
    interpret: bool = False

    def __post_init__(self):
        require(self.size >= 1 and self.size & (self.size - 1) == 0, self, "size", "must be a power of 2")


WRITTEN = {Sequential: "Sequential()", Associative: "Associative()", Chunked: "Chunked(size)", Kernel: "Kernel(size)"}


def check_form(form: Form, what: str, *kinds: type[Form]) -> None:
    """ValueError where `what` is not computed in this form, but in `kinds`; and for a kernel that nothing here runs."""
    if not isinstance(form, kinds):
        words = [WRITTEN[kind] for kind in kinds]
        raise ValueError(f"form = {form}: {what} are computed by {', '.join(words[:-1])} or {words[-1]}")
    if isinstance(form, Kernel) and not form.interpret and jax.default_backend() not in ("gpu", "tpu"):
        raise ValueError(f"form = Kernel({form.size}): needs a GPU or TPU; "
                         f"Kernel({form.size}, interpret=True) for tests")


def select(form: Form, length: int, sequential: Callable, chunked: Callable, kernel: Callable) -> Callable:
    """Which of these computes a recurrence of matrix states over `length` tokens. ValueError for `Associative()`."""
    check_form(form, "matrix states", Sequential, Chunked, Kernel)
    if isinstance(form, Sequential) or length == 1:
        return sequential
    if isinstance(form, Kernel):
        return functools.partial(kernel, size=form.size, interpret=form.interpret)
    return functools.partial(chunked, size=form.size)
