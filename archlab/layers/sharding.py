"""From letters to places: which mesh axes split which dimensions (`MESH_AXES`), of weights and of activations.

What concerns activations acts on the mesh in context (`jax.set_mesh`), and does nothing where there is none.
"""

import functools
import logging
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

from archlab.layers.alphabet import MESH_AXES, dims

report = functools.cache(logging.getLogger(__name__).log)  # each message once


def partition(letters: str, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """Which mesh axes split which dimension of an array.

    Args: letters: one per dimension ("D->HK", "BT."); shape: their sizes; mesh: a `Mesh`, or an abstract one.
    A mesh axis that an earlier dimension uses, or that does not divide the size, is left out and reported once.
    ValueError where it does not divide a stack of experts ("ED->F"): nobody asks for experts that lie on every device.
    """
    used, spec, stacked = set(), [], letters.partition("->")[0] if "->" in letters else ""
    for letter, size in zip(dims(letters), shape, strict=True):
        axes, taken, parts = MESH_AXES.get(letter, ()), [], 1
        for axis in (axes,) if isinstance(axes, str) else axes:
            count = mesh.shape[axis]
            if axis not in free_axes(mesh):
                continue
            if axis in used:
                report(logging.INFO, f"{letters!r}: {axis} splits an earlier dimension, so not {letter} = {size}")
            elif letter == "E" and "E" in stacked and size % count:
                raise ValueError(f"{letters!r}: {size} experts do not divide over {axis}:{count}")
            elif size % (parts * count):
                report(logging.WARNING, f"{letters!r}: {letter} = {size} does not divide by {parts * count}, "
                                        f"so it is not split over {axis}:{count}")
            else:
                taken.append(axis)
                parts *= count
        used.update(taken)
        spec.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """`x`, spread over the mesh in context as its letters say."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, partition(letters, x.shape, mesh)) if free_axes(mesh) else x


def per_shard(function: Callable, inputs: str, outputs: str) -> Callable:
    """`function`, run by every device of the mesh in context on its own shards of the arguments.

    For recurrences: left to the compiler, the gradient of what all rows share (a decay rate) is summed over devices at
    every step of time; so it is summed once.

    Args:
      function: takes and returns arrays (or a tuple of them); what it does in one place along a dimension that
        `MESH_AXES` may split must not depend on other places along it.
      inputs, outputs: the letters of each argument and result, as in "BTF BTN FN".
    """
    def run(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        if not free_axes(mesh):
            return function(*arrays)
        specs = lambda words, like: tuple(partition(w, a.shape, mesh) for w, a in zip(words.split(), like, strict=True))
        results = jax.eval_shape(function, *arrays)
        many = isinstance(results, tuple)
        out_specs = specs(outputs, results if many else (results,))
        # check_vma=False: shared arguments then count as one, and their gradient is summed at this door.
        return jax.shard_map(function, in_specs=specs(inputs, arrays), out_specs=out_specs if many else out_specs[0],
                             axis_names={*free_axes(mesh)}, check_vma=False)(*arrays)

    return run


def free_axes(mesh) -> dict[str, int]:
    """The axes of several devices, and their sizes, that the compiler and no enclosing `shard_map` looks after."""
    return {name: mesh.shape[name] for name, kind in zip(mesh.axis_names, mesh.axis_types)
            if kind == AxisType.Auto and mesh.shape[name] > 1}
