"""How a kernel walks through time: chunk after chunk, its state on the chip from one to the next.

On a TPU the last axis of the grid runs in order: chunks are its steps, Mosaic fetches the next while one is computed,
and the block of the last state, which no chunk moves, holds the state between them. On a GPU (Triton) the programs of a
grid run in any order, so one program loops over all chunks.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton


def on_tpu(platform: str | None) -> bool:
    """platform: None for the one in use."""
    return (platform or jax.default_backend()) == "tpu"


def on_gpu(platform: str | None) -> bool:
    """The same of a GPU. Where there is neither, kernels take their TPU form, to be interpreted."""
    return (platform or jax.default_backend()) == "gpu"


def sweep(body: Callable, letters: str, carry: list[jax.Array], arrays: list[jax.Array], outs: list, *,
          programs: int, reverse: bool = False, platform: str | None = None, interpret: bool = False):
    """`carry = body(c, carry, *refs)` for every chunk, in order or reverse; refs are those of `arrays`, then of `outs`.

    letters: one word for each of carry, arrays and outs, one letter for each dimension. B: rows. H: heads,
      one a program, or fewer groups of them. F: channels, of which each program takes its share. C: chunks, at
      `ref[c]`. Every other letter: the whole dimension. B and H are gone from the refs.
    programs: how many work on a row, side by side: one a head, or one a block of channels.
    outs: shapes and dtypes of the results. platform: "tpu" or "gpu"; None for the one in use.
    Returns: the carries after the last chunk, and the results.
    """
    words, everything = letters.split(), [*carry, *arrays, *outs]
    batch = carry[0].shape[0]
    chunks = next(a.shape[w.index("C")] for w, a in zip(words, everything, strict=True) if "C" in w)
    order = (lambda c: chunks - 1 - c) if reverse else (lambda c: c)
    tpu = not on_gpu(platform)
    n, m = len(carry), len(carry) + len(arrays)

    def spec(word, shape):
        block = {"B": lambda size: None, "H": lambda size: None, "F": lambda size: size // programs,
                 "C": lambda size: 1 if tpu else size}
        place = {"B": lambda size, b, h, c: b, "H": lambda size, b, h, c: jax.lax.div(h, np.int32(programs // size)),
                 "F": lambda size, b, h, c: h, "C": lambda size, b, h, c: order(c) if tpu else 0}

        def index(b, h, c=0):
            return tuple(place[letter](size, b, h, c) if letter in place else 0 for letter, size in zip(word, shape))

        return pl.BlockSpec(tuple(block[x](s) if x in block else s for x, s in zip(word, shape)), index)

    specs = [spec(word, a.shape) for word, a in zip(words, everything)]

    def in_grid(*refs):
        first, given, last, made = refs[:n], refs[n:m], refs[m:m + n], refs[m + n:]

        @pl.when(pl.program_id(2) == 0)
        def start():
            for ref, value in zip(last, first):
                ref[...] = value[...]

        state = body(0, [ref[...] for ref in last], *given, *made)
        for ref, value in zip(last, state):
            ref[...] = value

    def in_loop(*refs):
        first, given, last, made = refs[:n], refs[n:m], refs[m:m + n], refs[m + n:]
        run = lambda c, state: body(order(c), state, *given, *made)
        for ref, value in zip(last, jax.lax.fori_loop(0, chunks, run, [ref[...] for ref in first])):
            ref[...] = value

    call = functools.partial(pl.pallas_call, in_specs=specs[:m], out_specs=[*specs[:n], *specs[m:]],
                             out_shape=[*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in carry), *outs],
                             interpret=interpret)
    if tpu:
        parameters = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
        call = call(in_grid, grid=(batch, programs, chunks), compiler_params=parameters)
    else:
        call = call(in_loop, grid=(batch, programs), compiler_params=triton.CompilerParams(num_stages=1))
    # Products of float32 as such: tensor cores do them in three parts, where plain ones would do without these cores.
    with jax.default_matmul_precision("highest" if tpu or interpret else "TF32_TF32_F32_X3"):
        results = call(*carry, *arrays)
    return results[:n], results[n:]
