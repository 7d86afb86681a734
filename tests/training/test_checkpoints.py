"""Checkpoints: whole or passed over, of this run or refused; and the folder that holds a model."""

import dataclasses
import logging
import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import archlab
from archlab.layers.weights import split
from archlab.training.checkpoints import Checkpoints
from archlab.training.loop import Run
from archlab.training.optimizers import Optimizer
from archlab.training.step import TrainState, create_state, parameters

CONFIG = archlab.get_config("transformer-nano")
RUN = Run(CONFIG, steps=100, batch=4, context=16)


def state_of(step):
    weights = {"body/0/weight": jnp.arange(60.0).reshape(3, 20) + step, "norm/scale": jnp.full(3, step, jnp.float32)}
    moments = Optimizer("muon").build({"body/0/weight": Weight("D->F"), "norm/scale": Weight("->D")}).init(weights)
    return TrainState(weights, {"balance": jnp.ones(2)}, moments, jnp.int32(step))


class Weight:
    def __init__(self, letters):
        self.letters, self.decay, self.rate = letters, True, 1.0


def written(folder, steps=(10, 20)):
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in steps:
        checkpoints.save(step, state_of(step), {"next": step}, RUN, seconds=step / 2)
    checkpoints.close()


def restored(folder, run=RUN):
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        return checkpoints.restore(state_of(0), run)
    finally:
        checkpoints.close()


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(step: Path):
    path = largest(step / "model")
    os.truncate(path, path.stat().st_size // 2)


def flip(step: Path):
    path = largest(step / "model")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def empty(step: Path):
    os.truncate(step / "about" / "metadata", 0)


def test_round_trip_and_keep(tmp_path):
    assert restored(tmp_path) is None
    written(tmp_path, (10, 20, 30))
    state, data, seconds = restored(tmp_path)
    chex.assert_trees_all_equal(state, state_of(30))
    assert data == {"next": 30} and seconds == 15
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["20", "30"]


@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path, damage, caplog):
    written(tmp_path)
    damage(tmp_path / "checkpoints" / "20")
    with caplog.at_level(logging.WARNING):
        state, data, _ = restored(tmp_path)
    chex.assert_trees_all_equal(state, state_of(10))
    assert data == {"next": 10}
    assert "checkpoint 20" in caplog.text and "step 10" in caplog.text
    assert (tmp_path / "damaged-20").is_dir()  # nothing is thrown away, and step 20 can be saved again
    written(tmp_path, (20,))
    assert restored(tmp_path).data == {"next": 20}


def test_no_whole_checkpoint(tmp_path):
    written(tmp_path, (10,))
    truncate(tmp_path / "checkpoints" / "10")
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        restored(tmp_path)


def test_another_run_is_refused_by_field(tmp_path):
    written(tmp_path, (10,))
    other = dataclasses.replace(RUN, model=CONFIG.set("body.n", 3), batch=8, optimizer=Optimizer(learning_rate=0.5))
    with pytest.raises(ValueError) as error:
        restored(tmp_path, other)
    assert "model.body.n: 2 in the checkpoint, 3 now" in str(error.value)
    assert "batch: 4 in the checkpoint, 8 now" in str(error.value)
    assert "optimizer.learning_rate" in str(error.value)
    assert restored(tmp_path, dataclasses.replace(RUN, steps=200)) is not None  # a run may go on for longer


def test_save_and_load(tmp_path):
    model = archlab.create_model(CONFIG, rngs=nnx.Rngs(3))
    archlab.save(model, tmp_path / "model")
    again = archlab.load(tmp_path / "model")
    assert again.config == CONFIG
    chex.assert_trees_all_equal(split(again)[1], split(model)[1])
    ids = jnp.arange(12).reshape(2, 6)
    chex.assert_trees_all_equal(again(ids).logits, model(ids).logits)
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]


def test_load_takes_the_newest_whole_checkpoint_of_a_run(tmp_path):
    transform = RUN.optimizer.build(parameters(CONFIG))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    models = {}
    for step in (1, 2):
        _, state, _ = create_state(CONFIG, transform, seed=step)
        models[step] = state.params
        checkpoints.save(step, state, {}, RUN, 0.0)
    checkpoints.close()
    chex.assert_trees_all_equal(split(archlab.load(tmp_path))[1], models[2])
    truncate(tmp_path / "checkpoints" / "2")
    chex.assert_trees_all_equal(split(archlab.load(tmp_path))[1], models[1])
    assert (tmp_path / "checkpoints" / "2").is_dir()  # reading moves nothing


def test_load_lists_all_that_is_wrong(tmp_path):
    from safetensors.numpy import load_file, save_file

    archlab.save(archlab.create_model(CONFIG, rngs=nnx.Rngs(0)), tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    arrays.pop("embed/table")
    arrays["extra"] = np.zeros(1, np.float32)
    arrays["norm/scale"] = np.zeros(7, np.float32)
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        archlab.load(tmp_path)
    for words in ("missing: embed/table float32[256, 32]", "unknown: extra",
                  "norm/scale is float32[7], must be float32[32]"):
        assert words in str(error.value)


def test_load_refuses_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        archlab.load(tmp_path)
    archlab.save(archlab.create_model(CONFIG, rngs=nnx.Rngs(0)), tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(ValueError, match="cannot be read"):
        archlab.load(tmp_path)


def test_an_unstacked_model_is_not_saved(tmp_path):
    from archlab.layers.repeat import unstack

    with pytest.raises(ValueError, match="missing"):
        archlab.save(unstack(archlab.create_model(CONFIG, rngs=nnx.Rngs(0))), tmp_path)
    assert jax.tree.leaves(os.listdir(tmp_path)) == []
