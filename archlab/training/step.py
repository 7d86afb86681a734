"""One step of training: `jax.jit` over plain dictionaries of arrays, whose memory is given back to the result."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from archlab.data.batches import Batch
from archlab.layers.alphabet import Steered, parameters_of, variables_of
from archlab.layers.contract import Training, pytree
from archlab.layers.weights import merge, split
from archlab.model import LanguageModel, Model
from archlab.parallel.mesh import optimizer_shardings, parameter_shardings
from archlab.training.objectives import prepare, run
from archlab.training.reinforce import surrogate

# Traces of layers with experts that a step hands out.
WATCHED = ("load", "largest_logit", "dropped", "agreement", "skipped")
HIDING = 2**31 - 1  # what is folded into a step's key to draw what is hidden; micro-batches fold in their number


@pytree
class TrainState:
    """All that a step changes: parameters and other variables {path: array}, the optimizer's state, steps taken."""

    params: dict[str, jax.Array]
    rest: dict[str, jax.Array]
    optimizer: Any
    step: jax.Array


def abstract(config: LanguageModel) -> Model:
    """The model of a config with shapes in the place of arrays."""
    return nnx.eval_shape(lambda: config.build(nnx.Rngs(0)))


def create_state(config: LanguageModel, transform: optax.GradientTransformation, seed: int, mesh=None):
    """The model's structure, the state before the first step, and where it lies (None without a mesh)."""
    structure, create, shardings = make_create(config, transform, mesh)
    return structure, create(seed), shardings


def make_create(config: LanguageModel, transform: optax.GradientTransformation, mesh=None):
    """The model's structure, a jitted function `create(seed)` that gives the state before the first step, and where
    that lies (None without a mesh). On a mesh each weight is born where it will live."""
    def make(seed) -> TrainState:
        _, params, rest = split(config.build(nnx.Rngs(jax.random.key(seed))))
        return TrainState(params, rest, transform.init(params), jnp.zeros((), jnp.int32))

    model, shardings = abstract(config), None
    structure, params, _ = split(model)
    if mesh is not None:
        places, rest = parameter_shardings(model, mesh)
        whole = NamedSharding(mesh, PartitionSpec())
        shardings = TrainState(places, rest, optimizer_shardings(transform, params, places), whole)
    return structure, jax.jit(make, out_shardings=shardings), shardings


def make_train_step(structure: nnx.GraphDef, transform: optax.GradientTransformation, bytes_per_token: np.ndarray, *,
                    accumulate: int = 1, shardings: TrainState | None = None):
    """A jitted function `step(state, batch, rate=1.0, seed=0) -> (state, metrics)`; it consumes `state`.

    What `transform` gives is multiplied by the learning rate `rate`; from `seed` come the training form's random
    numbers, for each step its own. Both are inputs: one program serves every rate, schedule and seed.

    The loss is the mean of the negative log-likelihood over real targets, plus the losses that layers add. With
    `accumulate` = n the batch is run as n micro-batches of every n-th row and the sums are divided once: that equals
    the whole batch where losses are linear in it. Layers' own losses and updates are means over micro-batches.

    Args: bytes_per_token: [V].
    Returns metrics, scalars on the device: loss (nats per target), bits_per_byte, grad_norm, and aux/NAME for each
      loss that a layer adds; and "traces", those of layers with experts that training watches: {path: array}, where a
      path ends in load or largest_logit; means over micro-batches.
    """
    def loss_of(params, rest, batch: Batch, training: Training, count):
        model = merge(structure, params, rest)
        out = run(model, batch, training)
        nats = model.losses(out.hidden, batch.targets)
        nll = jnp.sum(nats * batch.weights) / count
        drawn = surrogate(nats, batch.weights, batch.segments, out.aux.policies) / count
        watched = {path: value for path, value in out.aux.traces.items() if path.split("/")[-1] in WATCHED}
        aux, updates, traces = jax.tree.map(lambda x: x / accumulate, (out.aux.losses, out.aux.updates, watched))
        return nll + drawn + sum(map(jnp.sum, aux.values())), (nll, jax.tree.map(jnp.sum, aux), updates, traces)

    def micro_batches(batch: Batch) -> Batch:  # every n-th row, so that rows spread over a mesh stay where they are
        cut = lambda a: a.reshape(a.shape[0] // accumulate, accumulate, *a.shape[1:]).swapaxes(0, 1)
        return jax.tree.map(cut, batch)

    def gradients(state: TrainState, batch: Batch, key, count):
        def one(batch, i):
            training = Training(jax.random.fold_in(key, i), state.step)
            return jax.value_and_grad(loss_of, has_aux=True)(state.params, state.rest, batch, training, count)

        if accumulate == 1:
            return one(batch, 0)
        pieces = micro_batches(batch)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype),
                             jax.eval_shape(one, jax.tree.map(lambda a: a[0], pieces), 0))
        add = lambda total, piece: (jax.tree.map(jnp.add, total, one(*piece)), None)
        return jax.lax.scan(add, zeros, (pieces, jnp.arange(accumulate)))[0]

    def step(state: TrainState, batch: Batch, rate=1.0, seed=0):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        model = merge(structure, state.params, state.rest)
        rates = {path: variable.rate for path, variable in variables_of(model, Steered).items()}
        batch = prepare(model.config, batch, jax.random.fold_in(key, HIDING))
        count = jnp.maximum(jnp.sum(batch.weights), 1)
        (_, (nll, aux, updates, traces)), grads = gradients(state, batch, key, count)
        moves, optimizer = transform.update(grads, state.optimizer, state.params)
        rest = move(state.rest, updates, rates)
        moves = {path: rate * update for path, update in moves.items()}
        new = TrainState(optax.apply_updates(state.params, moves), rest, optimizer, state.step + 1)
        length = jnp.sum(jnp.asarray(bytes_per_token)[batch.targets] * batch.weights)
        metrics = {"loss": nll, "bits_per_byte": nll * count / (jnp.maximum(length, 1) * jnp.log(2.0)),
                   "grad_norm": optax.tree.norm(grads), **{f"aux/{name}": value for name, value in aux.items()},
                   "traces": traces}
        return new, metrics

    # On a mesh all metrics are whole on every device: each process reads them.
    places = None if shardings is None else (shardings, shardings.step)
    return jax.jit(step, donate_argnums=0, out_shardings=places)


def move(rest: dict[str, jax.Array], updates: dict[str, jax.Array], rates: dict[str, float]) -> dict[str, jax.Array]:
    """The model's other variables after a step's updates, which `Aux.updates` names by path: what is `Steered` goes by
    its rate in their direction, to anything else they are added. rates: of what is steered, by path."""
    unknown = sorted(set(updates) - set(rest))
    if unknown:
        raise ValueError(f"updates for variables that the model does not have: {unknown}; it has {sorted(rest)}")
    after = lambda path, change: rest[path] + (rates[path] * jnp.sign(change) if path in rates else change)
    return rest | {path: after(path, change).astype(rest[path].dtype) for path, change in updates.items()}


def parameters(config: LanguageModel) -> dict[str, nnx.Param]:
    """{path: parameter} of a config, abstract: what `Optimizer.build` wants to know."""
    return parameters_of(abstract(config))
