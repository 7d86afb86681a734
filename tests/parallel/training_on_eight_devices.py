"""Training on eight devices; `test_eight_devices.py` runs this file in a process that pretends to have them.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest -n 0 tests/parallel/training_on_eight_devices.py

Every architecture is trained for ten steps on every mesh, with experts for twenty, and must have the gradients and
losses of one device.
"""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import archlab
import archlab.experts.parallel as expert_parallel
from archlab.data import Batch
from archlab.layers.alphabet import dims, parameters_of
from archlab.layers.weights import split
from archlab.parallel.mesh import global_batch, make_mesh, optimizer_shardings, parameter_shardings
from archlab.training.step import TrainState, abstract, create_state, make_train_step
from tests.helpers import cast

BYTES = np.ones(256, np.int32)
STEPS = 20


@functools.cache
def experts(name: str) -> int:
    """How many each layer of experts has; 0 where there are none."""
    weights = parameters_of(abstract(archlab.get_config(name))).values()
    return max(size for w in weights for letter, size in zip("E" + dims(w.letters), (0, *w.shape)) if letter == "E")


def one_of_many(name: str) -> bool:
    """Whether it only attends or recurs, and does not stand for those that do."""
    rooms = {type(part).__module__.split(".")[1] for _, part in archlab.get_config(name).body.walk()}
    return rooms <= {"layers", "attention"} or rooms <= {"layers", "attention", "recurrence"} and name != "mamba2-nano"


MESHES = ["data:2,fsdp:2,tensor:2", "data:8", "fsdp:8", "tensor:2,data:4"]
CASES = [(name, spec) for name in archlab.list_models("*-nano")
         for spec in (MESHES[:1] if one_of_many(name) else MESHES)  # the many mixers: on the hardest
         + ["expert:8"] * (experts(name) % 8 == 0)
         + ["expert:4,data:2", "fsdp:2,expert:2,tensor:2"] * (experts(name) > 0)]  # else these spread rows once more


@pytest.fixture(autouse=True)
def few_tokens_are_many(monkeypatch):
    """Without this so few tokens would always be gathered: with it, both forms of expert parallelism occur."""
    monkeypatch.setattr(expert_parallel, "LEAST", 4)


def batches(rows: int = 8, length: int = 16) -> list[Batch]:
    """Rows of two documents, most of them with padding at the end."""
    draw = np.random.default_rng(0)
    time = np.arange(length + 1)
    segments = np.where(time < draw.integers(4, length, (rows, 1)), 1, 2).astype(np.int32)
    segments[time > length - np.arange(rows)[:, None] % 3] = 0
    weights = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    of = lambda ids: Batch(ids[:, :-1], ids[:, 1:], segments[:, :-1], weights.astype(np.float32))
    return [of(draw.integers(0, 256, (rows, length + 1)).astype(np.int32)) for _ in range(STEPS)]


def remember() -> optax.GradientTransformation:
    """Changes nothing; its state is the newest gradient."""
    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params),
                                        lambda grads, state, params=None: (grads, grads))


@functools.cache
def start(name: str):
    """The optimizer, the model's structure, and the state before the first step, on the host."""
    config = archlab.get_config(name)
    rates = {path: weight.rate for path, weight in parameters_of(abstract(config)).items()}
    at_its_rate = optax.stateless(lambda updates, _: {path: rates[path] * update for path, update in updates.items()})
    transform = optax.chain(remember(), optax.clip_by_global_norm(1.0), optax.sgd(0.3, momentum=0.9), at_its_rate)
    structure, state, _ = create_state(config, transform, 0)
    return transform, structure, jax.device_get(state)


def magnifies(name: str) -> bool:
    """Whether a model routes or halts, so that round-off may flip a choice, or recurs, so that it may grow from step to
    step under so high a learning rate: those are compared in float64."""
    return any(type(part).__module__.startswith(("archlab.experts", "archlab.depth", "archlab.recurrence"))
               for _, part in archlab.get_config(name).walk())


@contextlib.contextmanager
def setting(name: str, mesh):
    with jax.enable_x64(magnifies(name)), contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def prepare(name: str, spec: str | None):
    """The compiled step on a mesh (None: on one device), the state before it, and how to place a batch."""
    (transform, structure, state), shardings, place = start(name), None, lambda batch: batch
    mesh = None if spec is None else make_mesh(spec)
    with setting(name, mesh):
        if mesh is not None:
            model = abstract(archlab.get_config(name))
            params, rest = parameter_shardings(model, mesh)
            shardings = TrainState(params, rest, optimizer_shardings(transform, split(model)[1], params),
                                   NamedSharding(mesh, PartitionSpec()))
            place = functools.partial(global_batch, mesh=mesh)
        state = jax.device_put(cast(state, np.float64) if magnifies(name) else state, shardings)
        step = make_train_step(structure, transform, BYTES, shardings=shardings)
        return step.lower(state, place(batches()[0])).compile(), state, place, mesh


def train(name: str, spec: str | None):
    """The first gradient {path: array}, and the losses of ten steps, or of twenty."""
    step, state, place, mesh = prepare(name, spec)
    first, losses = None, []
    with setting(name, mesh):
        for batch in batches()[: STEPS if experts(name) else STEPS // 2]:
            state, metrics = step(state, place(batch))
            first = jax.device_get(state.optimizer[0]) if first is None else first
            losses.append(float(metrics["loss"]))
    return first, np.array(losses)


one_device = functools.cache(lambda name: train(name, None))


@pytest.mark.parametrize("name, spec", CASES)
def test_training_equals_one_device(name, spec):
    gradient, losses = train(name, spec)
    expected_gradient, expected_losses = one_device(name)
    largest = max(np.abs(g).max() for g in expected_gradient.values())
    chex.assert_trees_all_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5 * largest)
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-4)
    assert expected_losses[0] > 4 and np.abs(np.diff(expected_losses)).min() > 1e-4  # the steps do change something
