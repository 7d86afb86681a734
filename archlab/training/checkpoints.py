"""Checkpoints of a run: model, optimizer, place in the data and config together, written while training goes on.

Orbax writes the arrays (and onto another mesh reads them back), behind this one class. Nothing is unpickled or run.
"""

import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from archlab.layers.config import Config, from_json
from archlab.training.run import Run
from archlab.training.step import TrainState

logger = logging.getLogger(__name__)
FREE = ("steps",)  # fields of a run that may change when it goes on


class Restored(NamedTuple):
    """The state; the data iterator's state; seconds of training so far."""

    state: TrainState
    data: dict
    seconds: float


class Checkpoints:
    """The checkpoints in a folder, of which the `keep` newest stay, and that of the step `always`."""

    def __init__(self, folder: Path | str, keep: int = 2, always: int = 0):
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must stay")
        self.folder = Path(folder).absolute()
        policy = ocp.checkpoint_managers
        stay = policy.AnyPreservationPolicy([policy.LatestN(keep), policy.CustomSteps([always])])
        options = ocp.CheckpointManagerOptions(preservation_policy=stay)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: TrainState, data: dict, run: Config, seconds: float) -> None:
        """Copies everything and returns; a thread writes it. `state` may be consumed at once."""
        model, optimizer = _parts(state)
        about = {"run": json.loads(run.to_json()), "data": data, "seconds": seconds,
                 "sums": _sums({"model": model, "optimizer": optimizer})}
        self.manager.save(step, args=ocp.args.Composite(
            model=ocp.args.StandardSave(model), optimizer=ocp.args.StandardSave(optimizer),
            about=ocp.args.JsonSave(about)))

    def restore(self, state: TrainState, run: Run) -> Restored | None:
        """The newest whole checkpoint, put where `state` lies; None where there is none yet.

        A damaged one is named in a warning, moved aside and passed over. ValueError where the checkpoint is of another
        run (the differing fields are named), and where there are checkpoints but no whole one.
        """
        return self._newest(_reader(state, self.manager), lambda step, about: _same_run(about["run"], run, self.folder))

    def branch(self, state: TrainState, run: Run) -> Restored:
        """The newest whole checkpoint of another run in this folder up to which `run` would have gone the same way: all
        settings are equal but the number of steps and the schedule, and so are the learning rates of the steps taken.

        ValueError where the runs differ, or where they part before the first checkpoint.
        """
        def check(step, about):
            old = from_json(json.dumps(about["run"]))
            _same_run(json.loads(old.unscheduled.to_json()), run.unscheduled, self.folder)
            ours, theirs = run.optimizer.rate(run.steps), old.optimizer.rate(old.steps)
            return step <= run.steps and all(ours(i) == theirs(i) for i in range(step))

        found = self._newest(_reader(state, self.manager), check, move=False)
        if found is None:
            steps = sorted(self.manager.all_steps()) or "none"
            raise ValueError(f"of the checkpoints in {self.folder} ({steps}) a run "
                             f"of {run.steps} steps with {run.optimizer} has the same learning rates up to none")
        return found

    def restore_model(self, template) -> tuple[Config, dict, dict]:
        """The newest whole model: its config, parameters and other variables, on the first device.

        Args: template: a function from the model's config to (parameters, other variables), abstract.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def read(step, about):
            config = from_json(json.dumps(about["run"]["model"]))
            params, rest = template(config)
            place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device)
            wanted = jax.tree.map(place, {"params": params, "rest": rest})
            found = self.manager.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore(wanted)))["model"]
            _compare_sums(_sums({"model": found}), about["sums"])
            return config, found["params"], found["rest"]

        found = self._newest(read, lambda _, about: from_json(json.dumps(about["run"]["model"])), move=False)
        if found is None:
            raise ValueError(f"{self.folder} holds no checkpoint")
        return found

    def close(self) -> None:
        """Waits until everything is written."""
        self.manager.close()

    def _newest(self, read, check, move: bool = True):
        """What `read(step, about)` gives for the newest step where it succeeds; steps for which `check(step, about)` is
        False are passed over."""
        damaged = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                about = self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
                about["run"], about["data"], about["sums"]
            except Exception as error:  # orbax and tensorstore raise whatever they like
                damaged.append((step, error))
                continue
            if check(step, about) is False:
                continue
            try:
                found = read(step, about)
            except Exception as error:
                damaged.append((step, error))
                continue
            for bad, error in damaged:
                logger.warning("checkpoint %d in %s is damaged (%s); going back to the whole one of step %d",
                                bad, self.folder, str(error).split("\n")[0][:160], step)
            if damaged and move:
                self._move_aside([bad for bad, _ in damaged])
            return found
        if damaged:
            step, error = damaged[0]
            raise ValueError(f"no checkpoint in {self.folder} is whole; of step {step}: {str(error)[:300]}") from error
        return None

    def _move_aside(self, steps: list[int]) -> None:
        for step in steps if jax.process_index() == 0 else ():
            target = self.folder.parent / f"damaged-{step}"
            while target.exists():
                target = target.with_name(target.name + "-again")
            os.rename(self.folder / str(step), target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints moved")
        self.manager.reload()


def differences(old, new, path: str = "") -> list[str]:
    """Where two trees from JSON differ, a line each: "model.width: 32 in the checkpoint, 64 now"."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type"):
        pairs = [(key, old.get(key), new.get(key)) for key in dict.fromkeys((*old, *new))]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(old, new))]
    else:
        short = lambda value: value.get("type", "...") if isinstance(value, dict) else repr(value)
        return [] if old == new else [f"{path}: {short(old)} in the checkpoint, {short(new)} now"]
    return [line for key, a, b in pairs for line in differences(a, b, f"{path}.{key}" if path else key)]


def _reader(state: TrainState, manager: ocp.CheckpointManager):
    """A function of (step, about) that reads a checkpoint to where `state` lies."""
    model, optimizer = jax.tree.map(_template, _parts(state))

    def read(step: int, about: dict) -> Restored:
        found = manager.restore(step, args=ocp.args.Composite(
            model=ocp.args.StandardRestore(model), optimizer=ocp.args.StandardRestore(optimizer)))
        found = {"model": found["model"], "optimizer": found["optimizer"]}
        _compare_sums(_sums(found), about["sums"])
        (params, rest), (moments, count) = found["model"].values(), found["optimizer"].values()
        return Restored(TrainState(params, rest, moments, count), about["data"], about["seconds"])

    return read


def _same_run(old: dict, new: Run, folder: Path) -> None:
    drop = lambda run: {key: value for key, value in run.items() if key not in FREE}
    lines = differences(drop(old), drop(json.loads(new.to_json())))
    if lines:
        raise ValueError(f"{folder} holds checkpoints of another run; use another folder or the same settings:\n  "
                         + "\n  ".join(lines))


def _parts(state: TrainState):
    return ({"params": state.params, "rest": state.rest}, {"moments": state.optimizer, "step": state.step})


def _template(a: jax.Array):
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)


@jax.jit
def _bit_sums(leaves):
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
    bits = lambda a: jax.lax.bitcast_convert_type(a, unsigned[a.dtype.itemsize]).astype(jnp.uint32)
    return [jnp.sum(bits(jnp.uint8(a) if a.dtype == bool else a), dtype=jnp.uint32) for a in leaves]


def _sums(tree) -> dict[str, int]:
    """A sum of all bits of each array, the same on every mesh: the arrays' files carry no checksum of their own."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_bit_sums([value for _, value in leaves]))
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums)}


def _compare_sums(found: dict[str, int], wanted: dict[str, int]) -> None:
    wrong = [name for name, value in found.items() if wanted.get(name) != value]
    if wrong:
        raise ValueError(f"{len(wrong)} arrays are not what was saved, as {wrong[0]}")
