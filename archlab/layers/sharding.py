"""From letters to places: which mesh axes split which dimensions (`MESH_AXES`), of weights and of activations."""

import functools
import logging
import math

import jax
from jax.sharding import AxisType, PartitionSpec

from archlab.layers.alphabet import MESH_AXES, dims

report = functools.cache(logging.getLogger(__name__).log)  # each message once


def partition(letters: str, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """Which mesh axes split which dimension of an array.

    Args: letters: one per dimension ("D->HK", "BT."); shape: their sizes; mesh: a `Mesh`, or an abstract one.
    A mesh axis that an earlier dimension uses, or that does not divide the size, is left out and reported once.
    """
    auto = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
    used, spec = set(), []
    for letter, size in zip(dims(letters), shape, strict=True):
        axes = MESH_AXES.get(letter, ())
        taken = []
        for axis in (axes,) if isinstance(axes, str) else axes:
            parts = math.prod(mesh.shape[name] for name in (*taken, axis))
            if mesh.shape[axis] == 1 or axis not in auto:
                continue
            if axis in used:
                report(logging.INFO, f"{letters!r}: {axis} splits an earlier dimension, so not {letter} = {size}")
            elif size % parts:
                report(logging.WARNING, f"{letters!r}: {letter} = {size} does not divide by {parts}: "
                                        f"not split over {axis}:{mesh.shape[axis]}")
            else:
                taken.append(axis)
        used.update(taken)
        spec.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """`x`, spread over the mesh in context (`jax.set_mesh`) as its letters say; `x` itself where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition(letters, x.shape, mesh))
