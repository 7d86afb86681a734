"""The tensors of a folder: safetensors files, one or several with an index.

Reading is by `pread` into the place where the numbers shall live, not by mapping files into memory: pages of a mapped
file count as the process's own, so a model would weigh twice while it is loaded; and bfloat16 is read as what it is.
The format (https://github.com/huggingface/safetensors): eight bytes, the header's length; a header of JSON, {name:
{dtype, shape, data_offsets}}; the numbers, little-endian.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from archlab.hub import mxfp4

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes of a file that is written
HEADER = 100 * 2**20  # the longest header that the format allows
PIECE = 2**20  # bytes read at once
TILE = 2**16  # bytes moved at once: rows of a tile are columns of ours, and both must stay in a core's cache
DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
          "U32": np.dtype(np.uint32), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(bool)}


Box = tuple[slice, ...]  # a part of a tensor, as a slice of each dimension; all but the first may have steps


class Tensor(NamedTuple):
    """Where a tensor lies. kind: of its numbers, as the file calls it; dtype: as which they are read, None for one that
    cannot be. scales: where the other half of an MXFP4 tensor lies."""

    file: Path
    offset: int
    kind: str
    dtype: np.dtype | None
    shape: tuple[int, ...]
    scales: "Tensor | None" = None


class Tensors:
    """The tensors of a folder by name; a context manager that holds its files open.

    ValueError where there are none, where files are not what they should be, and for weights in pickles.
    """

    def __init__(self, folder: str | Path):
        self.found: dict[str, Tensor] = {}
        self._open: dict[Path, int] = {}
        for file, names in _files(Path(folder)):
            self.found.update(read_header(file, names))
        self.found = mxfp4.joined(self.found)

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def open(self) -> None:
        """Opens all files, so that threads may read."""
        parts = [part for tensor in self.found.values() for part in (tensor, tensor.scales) if part]
        for file in {part.file for part in parts} - set(self._open):
            self._open[file] = os.open(file, os.O_RDONLY)

    def scatter(self, name: str, targets: list[tuple[Box, np.ndarray]]) -> None:
        """Reads a tensor once, and each box of it into its array (of the box's shape, any strides, any dtype)."""
        tensor = self.found[name]
        width = math.prod(tensor.shape[1:])
        row_bytes = max(1, width * tensor.dtype.itemsize)
        step, tile = max(1, PIECE // row_bytes), max(64 // tensor.dtype.itemsize, TILE // row_bytes)
        targets = [(box or (slice(0, 1),), array if box else array[None]) for box, array in targets]  # a single number
        last = max(rows.stop for (rows, *_), _ in targets)
        buffer = np.empty((min(step, last), *tensor.shape[1:]), tensor.dtype)
        for start in range(min(rows.start for (rows, *_), _ in targets), last, step):
            piece = buffer[:last - start]
            stop = start + len(piece)
            wanted = [(box, array) for box, array in targets if box[0].start < stop and box[0].stop > start]
            if wanted:
                piece = self._rows(tensor, start, piece)
            for (rows, *rest), array in wanted:
                for row in range(max(rows.start, start), min(rows.stop, stop), tile):
                    end = min(row + tile, rows.stop, stop)
                    _move(piece[row - start:end - start, *rest], array[row - rows.start:end - rows.start])

    def _rows(self, tensor: Tensor, start: int, buffer: np.ndarray) -> np.ndarray:
        """As many rows of a tensor from `start` on as the buffer has; in it, where they are stored as what they are."""
        if tensor.scales is None:
            self._read(tensor, start * buffer[0].nbytes, buffer)
            return buffer
        _, inputs, outputs = tensor.shape
        scales = np.empty((len(buffer), outputs, inputs // mxfp4.BLOCK), np.uint8)
        blocks = np.empty((*scales.shape, mxfp4.BLOCK // 2), np.uint8)
        for part, rows in ((tensor, blocks), (tensor.scales, scales)):
            self._read(part, start * rows[0].nbytes, rows)
        return mxfp4.decoded(blocks, scales)

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors are of one shape, one kind of number, and equal byte for byte."""
        a, b = self.found[name], self.found[other]
        if (a.shape, a.kind) != (b.shape, b.kind) or a.dtype is None:
            return False
        self.open()
        size = math.prod(a.shape) * a.dtype.itemsize
        pieces = np.empty((2, min(PIECE, size)), np.uint8)
        for start in range(0, size, PIECE):
            pieces = pieces[:, :size - start]
            self._read(a, start, pieces[0])
            self._read(b, start, pieces[1])
            if (pieces[0] != pieces[1]).any():
                return False
        return True

    def _read(self, tensor: Tensor, offset: int, into: np.ndarray) -> None:
        buffer, offset = memoryview(into.reshape(-1).view(np.uint8)), tensor.offset + offset
        while buffer:
            count = os.preadv(self._open[tensor.file], [buffer], offset)
            if not count:
                raise ValueError(f"{tensor.file} ends before its tensors do")
            buffer, offset = buffer[count:], offset + count


def read_header(file: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Where the tensors of a safetensors file lie. names: those that must be there and are wanted; None for all."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(HEADER, size - 8):
                raise ValueError(f"its header would be {length} bytes long")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {name: _tensor(file, 8 + length, size, name, entry) for name, entry in header.items()}
        if missing := set(names or ()) - set(found):
            raise ValueError(f"it lacks {sorted(missing)[:3]}, which the index places in it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return found if names is None else {name: found[name] for name in names}


def _tensor(file: Path, origin: int, size: int, name: str, entry: dict) -> Tensor:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), DTYPES.get(entry["dtype"])
    whole = all(type(n) is int and 0 <= n < 2**63 for n in (begin, end, *shape))
    if not whole or not begin <= end <= size - origin:
        raise ValueError(f"{name} lies outside the file")
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{name} of shape {list(shape)} has {end - begin} bytes")
    return Tensor(file, origin + begin, entry["dtype"], dtype, shape)


def _files(folder: Path) -> list[tuple[Path, list[str] | None]]:
    """The files of a folder, and the tensors to take from each (None for all)."""
    if (folder / SINGLE).is_file():
        return [(folder / SINGLE, None)]
    if (folder / INDEX).is_file():
        return _index(folder)
    if others := sorted(file.name for file in folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no {SINGLE} and no {INDEX}, only {', '.join(others[:3])}: shards need their "
                         "index, and adapters are not supported")
    if pickles := [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)]:
        raise ValueError(f"{folder} holds its weights as pickles ({pickles[0]}), which can run any code and are never "
                         "opened here: convert them to safetensors first")
    raise ValueError(f"{folder} holds no {SINGLE} and no {INDEX}")


def _index(folder: Path) -> list[tuple[Path, list[str]]]:
    try:
        places = json.loads((folder / INDEX).read_text())["weight_map"]
        files: dict[str, list[str]] = {}
        for name, file in places.items():
            files.setdefault(file, []).append(name)
        for file in files:
            if Path(file).name != file or file in ("", ".", ".."):
                raise ValueError(f"{file!r} is no name of a file in this folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} cannot be read: {error}") from error
    return [(folder / file, names) for file, names in sorted(files.items())]


def _move(source: np.ndarray, target: np.ndarray) -> None:
    """`target[...] = source`. bfloat16 moves as the whole numbers it is made of, several times as fast."""
    if source.dtype == ml_dtypes.bfloat16 and target.dtype == ml_dtypes.bfloat16:
        target.view(np.uint16)[...] = source.view(np.uint16)
    elif source.dtype == ml_dtypes.bfloat16 and target.dtype == np.float32:  # of which it is the upper half
        target[...] = np.left_shift(source.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
    else:
        target[...] = source


def aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array whose memory JAX can take over on a CPU without a copy: it wants multiples of 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start:start + size].view(dtype).reshape(shape)


def write(folder: Path, shapes: dict[str, tuple[int, ...]], dtype_of, make, shard: int = SHARD) -> list[str]:
    """Writes tensors as NAME.part files, in shards of at most `shard` bytes.

    Args: dtype_of(name); make(name): the array, made when its shard is written.
    Returns: the final names of all files written; each is there as NAME.part.
    """
    from safetensors.numpy import save_file

    shards, room = [], 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype_of(name).itemsize
        if size > room or not shards:
            shards.append([])
            room = shard
        shards[-1].append(name)
        room -= size
    files = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
                                               for i in range(len(shards))]
    for file, names in zip(files, shards):
        save_file({name: make(name) for name in names}, folder / f"{file}.part", {"format": "pt"})
    if len(shards) > 1:
        total = sum(math.prod(shape) * dtype_of(name).itemsize for name, shape in shapes.items())
        index = {"metadata": {"total_size": total},
                 "weight_map": {name: file for file, names in zip(files, shards) for name in names}}
        (folder / f"{INDEX}.part").write_text(json.dumps(index, indent=1))
        files.append(INDEX)
    return files
