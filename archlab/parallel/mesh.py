"""Meshes, and where on them everything lies. The letters of a parameter say it all (`MESH_AXES`).

    mesh = make_mesh("data:2,fsdp:4")
    model = init_sharded(config, seed=0, mesh=mesh)            # every weight is born where it will live
    with jax.set_mesh(mesh):                                   # the model then keeps the rows of a batch spread out
        params, loss = step(params, global_batch(batch, mesh))

The compiler does the rest (GSPMD, arXiv:2105.04663): computations follow their data, collectives are inserted.
"""

import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from archlab.layers.alphabet import MESH_AXES, parameters_of
from archlab.layers.config import near
from archlab.layers.sharding import partition
from archlab.layers.weights import merge, split

AXES = ("data", "fsdp", "expert", "tensor")  # slowest network first, fastest last
ROWS = MESH_AXES["B"]


def make_mesh(spec: str | None = None, devices=None) -> Mesh:
    """A mesh of all four axes: "data:2,fsdp:4" gives sizes 2, 4, 1, 1 to data, fsdp, expert, tensor.

    Args: spec: axis:size pairs; None puts all devices on data. devices: by default all of them, of every process.
    Raises ValueError for an unknown or repeated axis, a size that is no positive integer, and sizes whose product is
    not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict.fromkeys(AXES, 1)
    if not spec:
        sizes["data"] = len(devices)
    named = set()
    for part in spec.split(",") if spec else ():
        axis, _, size = (word.strip() for word in part.partition(":"))
        if axis not in sizes:
            raise ValueError(f"mesh {spec!r}: no axis {axis!r}; {near(axis, AXES)}")
        if axis in named:
            raise ValueError(f"mesh {spec!r}: axis {axis!r} is named twice")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh {spec!r}: the size {size!r} of {axis} must be a positive integer, as in {axis}:2")
        named.add(axis)
        sizes[axis] = int(size)
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh {spec!r} asks for {' x '.join(map(str, sizes.values()))} = "
                         f"{math.prod(sizes.values())} devices; there are {len(devices)}")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def sharding_of(letters: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where an array of these letters and this shape lies on the mesh; see `partition`."""
    return NamedSharding(mesh, partition(letters, shape, mesh))


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> tuple[dict[str, NamedSharding], dict[str, NamedSharding]]:
    """Shardings of a model's parameters and of its other variables (replicated), under the paths of `split`.

    Args: model: real, or abstract (`nnx.eval_shape(lambda: create_model(...))`).
    """
    weights = parameters_of(model)
    _, parameters, rest = split(model)
    return ({path: sharding_of(weights[path].letters, weights[path].shape, mesh) for path in parameters},
            {path: NamedSharding(mesh, PartitionSpec()) for path in rest})


def optimizer_shardings(optimizer, parameters: dict, shardings: dict[str, NamedSharding]):
    """Shardings for the state of an optax optimizer over a flat dictionary of parameters.

    What has the path of a parameter (moments) is split along the same dimensions, where it kept them (the factors of
    Adafactor have sizes of 1); all else (counts) is replicated.

    Args: parameters: {path: array, real or abstract}; shardings: {path: its sharding}.
    Returns: shardings in the structure of `optimizer.init(parameters)`, for `jax.jit(optimizer.init, out_shardings=)`.
    """
    mesh = next(iter(shardings.values())).mesh

    def place(keys, leaf):
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey) and key.key in shardings]
        if not names or parameters[names[-1]].ndim != leaf.ndim:
            return NamedSharding(mesh, PartitionSpec())
        sizes, spec = parameters[names[-1]].shape, shardings[names[-1]].spec
        return NamedSharding(mesh, PartitionSpec(*(s if n == m else None for s, n, m in zip(spec, sizes, leaf.shape))))

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, parameters))


def init_sharded(config, seed: int, mesh: Mesh) -> nnx.Module:
    """The model of a config, its weights born sharded: no device ever holds the whole of one that is split.

    The weights are those of `config.build(nnx.Rngs(seed))`, on every mesh.
    """
    abstract = nnx.eval_shape(lambda: config.build(nnx.Rngs(seed)))
    born = jax.jit(lambda: split(config.build(nnx.Rngs(seed)))[1:], out_shardings=parameter_shardings(abstract, mesh))
    return merge(split(abstract)[0], *born())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch: rows, the first dimension, are split over data, fsdp and expert jointly."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def process_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of how many equal shares of a batch's rows this process must load.

    Processes that differ only in the tensor axis load the same rows. ValueError where a process's rows are no such
    share.
    """
    owners = [{device.process_index for device in row} for row in mesh.devices.reshape(-1, mesh.shape["tensor"])]
    mine = [shard for shard, processes in enumerate(owners) if jax.process_index() in processes]
    count, index = len(owners) // len(mine), mine[0] // len(mine)
    if count * len(mine) != len(owners) or mine != list(range(index * len(mine), (index + 1) * len(mine))):
        raise ValueError(f"process {jax.process_index()} owns the batch shards {mine} of {len(owners)}: order the "
                         "mesh's devices so that each process owns one even run of them")
    return index, count


def global_batch(batch, mesh: Mesh):
    """Global arrays, rows spread over the mesh, from what each process has loaded (its `process_share`).

    Args: batch: a pytree of NumPy arrays, rows first. ValueError where rows do not divide by the mesh.
    """
    _, count = process_share(mesh)
    shards = math.prod(mesh.shape[axis] for axis in ROWS)

    def spread(a):
        rows = a.shape[0] * count
        if rows % shards:
            sizes = ", ".join(f"{axis}:{mesh.shape[axis]}" for axis in ROWS)
            raise ValueError(f"a batch of {rows} rows does not divide over {sizes}: it must be a multiple of {shards}")
        return jax.make_array_from_process_local_data(batch_sharding(mesh), np.asarray(a), (rows, *a.shape[1:]))

    return jax.tree.map(spread, batch)
