"""Adafactor's second moment (Shazeer & Stern 2018, arXiv:1804.04235), factored by letters and not by sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from archlab.layers.alphabet import COPIES, dims

EPSILON = 1e-30  # added to squared gradients (their epsilon_1)
LARGEST = 1.0  # root mean square above which an update is scaled down (their d)


class FactoredState(NamedTuple):
    """count: steps taken. rows, columns: {path: array}; for a parameter that is not factored, `rows` is its whole
    second moment and `columns` a zero."""

    count: jax.Array
    rows: dict[str, jax.Array]
    columns: dict[str, jax.Array]


def matrix_axes(letters: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a matrix's rows (inputs) and of its columns (outputs): "LD->HK" gives (1,), (2, 3).

    The others are copies (layers, experts), each a matrix of its own.
    """
    before = len(letters.split("->")[0])
    rows = tuple(axis for axis in range(before) if letters[axis] not in COPIES)
    return rows, tuple(range(before, len(dims(letters))))


def scale_by_factored_rms(letters: dict[str, str]) -> optax.GradientTransformation:
    """Divides gradients by the root of their second moment, of which a parameter with inputs and outputs keeps only
    the means over its outputs (rows) and over its inputs (columns): rows + columns numbers instead of rows x columns.

    With R, C these means and a decay of 1 - t^-0.8 at step t, the second moment is R C / mean(R), within each copy
    (layers, experts). An update whose root mean square exceeds 1 is scaled down to it, copy by copy. Steps are not
    relative to the parameter's size (as in Zhai et al. 2022, arXiv:2106.04560), so AdamW's learning rates fit.

    Args: letters: {path: letters}, of flat dictionaries of parameters.
    """
    def axes(path):
        into, out = matrix_axes(letters[path])
        return into, out, bool(into and out)

    def init(parameters):
        rows, columns = {}, {}
        for path, value in parameters.items():
            into, out, factored = axes(path)
            rows[path] = jnp.mean(jnp.zeros_like(value), out, keepdims=True) if factored else jnp.zeros_like(value)
            columns[path] = jnp.mean(jnp.zeros_like(value), into, keepdims=True) if factored else jnp.zeros(())
        return FactoredState(jnp.zeros((), jnp.int32), rows, columns)

    def update(gradients, state, parameters=None):
        count = state.count + 1
        keep = 1 - count.astype(jnp.float32) ** -0.8
        updates, rows, columns = {}, {}, {}
        for path, gradient in gradients.items():
            into, out, factored = axes(path)
            square = jnp.square(gradient) + EPSILON
            if factored:
                rows[path] = keep * state.rows[path] + (1 - keep) * jnp.mean(square, out, keepdims=True)
                columns[path] = keep * state.columns[path] + (1 - keep) * jnp.mean(square, into, keepdims=True)
                row, column = rows[path] / jnp.mean(rows[path], into, keepdims=True), columns[path]
                scaled = gradient * jax.lax.rsqrt(row) * jax.lax.rsqrt(column)
            else:
                rows[path] = keep * state.rows[path] + (1 - keep) * square
                columns[path] = state.columns[path]
                scaled = gradient * jax.lax.rsqrt(rows[path])
            size = jnp.sqrt(jnp.mean(jnp.square(scaled), into + out, keepdims=True))
            updates[path] = scaled / jnp.maximum(1, size / LARGEST)
        return updates, FactoredState(count, rows, columns)

    return optax.GradientTransformation(init, update)
