"""Parameters filled from a folder's tensors: every array is allocated once, and read into where it stays."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from archlab.hub.layout import Part, Window, divisible, flattened, within
from archlab.hub.plan import Stored
from archlab.hub.tensors import Tensors, aligned

THREADS = 4  # one core cannot turn matrices as fast as a disk reads them


def check_dtype(dtype):
    """The dtype that parameters shall have, or None. ValueError for what is no floating-point type."""
    try:
        if dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            return dtype and jnp.dtype(dtype)
    except TypeError:
        pass
    raise ValueError(f"dtype = {dtype!r}: must be that of parameters, such as bfloat16 or float32")


def read(wanted: dict[str, Stored], names: dict[str, str], tensors: Tensors, dtypes: dict[str, object],
         shardings: dict[str, jax.sharding.Sharding] | None = None) -> dict[str, jax.Array]:
    """The arrays of a model by path.

    Args: wanted: the tensors in which they lie; names: what each is called in the folder; those left out are zero.
      dtypes: {path: dtype, None for what is stored}. shardings: {path: where on a mesh}; then only what this process's
      devices hold is read.
    """
    parts: dict[str, list[tuple[str | None, Part]]] = {path: [] for path in dtypes}
    for name, stored in wanted.items():
        for part in stored.parts:
            parts[part.path].append((names.get(name), part))
    shapes = {path: pairs[0][1].shape for path, pairs in parts.items()}
    places = shardings or {}

    arrays = {}  # {path: {window: array}}, all allocated before the first is filled
    targets: dict[str, list] = {}  # {name in the folder: what `scatter` shall do with it}
    for path, shape in shapes.items():
        stored = (tensors.found[name].dtype if name else jnp.float32 for name, _ in parts[path])
        kind = dtypes[path] or jnp.result_type(*stored)
        arrays[path] = {}
        for window in _windows(shape, places.get(path), [part for _, part in parts[path]]):
            array = arrays[path][window] = aligned(tuple(stop - start for start, stop in window), jnp.dtype(kind))
            for name, part in parts[path]:
                if name is None:
                    array[...] = 0
                elif boxes := within(part, window):
                    local = part._replace(at={axis: n - window[axis][0] for axis, n in part.at.items()})
                    view = flattened(array, local)
                    targets.setdefault(name, []).extend((theirs, view[ours]) for ours, theirs in boxes)

    tensors.open()
    in_order = sorted(targets, key=lambda name: tensors.found[name][:2])  # of the files, as disks like it
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda name: tensors.scatter(name, targets[name]), in_order):
            pass
    return {path: _to_jax(arrays.pop(path), shape, places.get(path)) for path, shape in shapes.items()}


def _windows(shape, sharding, parts: list[Part]) -> set[Window]:
    """The windows of a parameter that this process's devices hold; all of it where a tensor cannot be cut so."""
    whole = tuple((0, n) for n in shape)
    if sharding is None:
        return {whole}
    windows = {_concrete(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}
    return windows if all(divisible(part, w) for part in parts for w in windows) else {whole}


def _to_jax(pieces: dict, shape, sharding) -> jax.Array:
    """The array of JAX whose windows have been read; on a CPU it takes their memory over."""
    if sharding is None:
        return jax.device_put(next(iter(pieces.values())), may_alias=True)

    def piece(index):
        window = _concrete(index, shape)
        return pieces[window] if window in pieces else next(iter(pieces.values()))[index]

    return jax.make_array_from_callback(shape, sharding, piece)


def _concrete(index, shape) -> Window:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape))
