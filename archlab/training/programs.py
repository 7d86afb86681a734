"""What training compiles: once for all runs that differ in nothing but learning rate, schedule, length and seed."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from archlab.data.batches import Batch
from archlab.parallel.mesh import batch_sharding
from archlab.training.evaluation import make_evaluate_step
from archlab.training.run import Run
from archlab.training.step import make_create, make_train_step, parameters


class Programs:
    """The programs of a run: `create(seed)` gives the state before the first step, `step(state, batch, rate, seed)` is
    `compiled`, `evaluate` is as from `make_evaluate_step`. `structure` and `shardings` are those of the model."""

    def __init__(self, run: Run, bytes_per_token: np.ndarray, mesh=None):
        """bytes_per_token: [V]. On a mesh, call it under `jax.set_mesh(mesh)`."""
        self.bytes_per_token, self.mesh, self._key = bytes_per_token, mesh, _key(run)
        transform = run.optimizer.build(parameters(run.model))
        self.structure, self.create, self.shardings = make_create(run.model, transform, mesh)
        began = time.perf_counter()
        step = make_train_step(self.structure, transform, bytes_per_token, accumulate=run.accumulate,
                               shardings=self.shardings)
        state = jax.eval_shape(self.create, 0)
        if mesh is not None:
            place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
            state = jax.tree.map(place, state, self.shardings)
        rate, seed = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        self.compiled = step.lower(state, _shapes(run, mesh), rate, seed).compile()  # no step ever compiles again
        self.compile_seconds = time.perf_counter() - began
        self.evaluate = make_evaluate_step(self.structure, bytes_per_token)

    def step(self, state, batch: Batch, rate: float, seed: int):
        """As from `make_train_step`; it consumes `state`."""
        return self.compiled(state, batch, np.float32(rate), np.int32(seed))

    def check(self, run: Run, bytes_per_token: np.ndarray, mesh=None) -> None:
        """ValueError where these are not the programs of `run`."""
        if _key(run) != self._key or mesh != self.mesh or not np.array_equal(bytes_per_token, self.bytes_per_token):
            raise ValueError("programs: these were compiled for another model, batch, context, optimizer, tokenizer or "
                             "mesh; runs share them that differ in learning rate, schedule, steps and seed alone")


def _key(run: Run) -> Run:
    """The run, with defaults in the place of what programs take as inputs."""
    return dataclasses.replace(run.unscheduled, seed=0, data="", tokenizer="")


def _shapes(run: Run, mesh) -> Batch:
    sharding = None if mesh is None else batch_sharding(mesh)
    of = lambda dtype: jax.ShapeDtypeStruct((run.batch, run.context), dtype, sharding=sharding)
    return Batch(of(jnp.int32), of(jnp.int32), of(jnp.int32), of(jnp.float32))
