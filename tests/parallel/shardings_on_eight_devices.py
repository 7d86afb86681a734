"""What lies where on eight devices, and what travels; `test_eight_devices.py` runs this file."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import archlab
from archlab.analysis.collectives import collectives as read_collectives
from archlab.layers.embedding import Embedding
from archlab.layers.sharding import per_shard
from archlab.layers.weights import split
from archlab.parallel.mesh import global_batch, init_sharded, make_mesh, parameter_shardings
from archlab.training.checkpoints import Checkpoints
from archlab.training.loop import Run
from archlab.training.optimizers import Optimizer
from archlab.training.step import create_state, parameters
from tests.parallel.training_on_eight_devices import prepare


def test_weights_are_born_sharded():
    config, mesh = archlab.get_config("transformer-nano"), make_mesh("data:2,fsdp:2,tensor:2")
    model = init_sharded(config, 3, mesh)
    _, params, _ = split(model)
    shapes = {path: value.addressable_shards[0].data.shape for path, value in params.items()}
    assert shapes["embed/table"] == (128, 16)  # [V, D] = [256, 32] over tensor and fsdp
    assert shapes["body/unit/layers/0/layer/query"] == (2, 16, 2, 8)  # [L, D, H, K] = [2, 32, 4, 8]
    assert shapes["body/unit/layers/1/layer/down"] == (2, 32, 16)  # [L, F, D] = [2, 64, 32]
    _, expected, _ = split(config.build(nnx.Rngs(3)))  # the weights do not depend on the mesh
    chex.assert_trees_all_close(jax.device_get(params), jax.device_get(expected), rtol=1e-6)


def test_no_device_draws_the_whole_of_a_weight():
    """The program that draws the weights needs less memory on each device than the whole table."""
    mesh = make_mesh("fsdp:8")
    build = lambda: Embedding(4096, 64, nnx.Rngs(0))
    places = parameter_shardings(nnx.eval_shape(build), mesh)
    program = jax.jit(lambda: split(build())[1:], out_shardings=places).lower().compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 4096 * 64 * 4 * 0.75


def test_optimizer_state_lies_where_its_parameters_do():
    config, mesh = archlab.get_config("transformer-nano"), make_mesh("fsdp:8")
    for name in ("adamw", "muon", "adafactor"):
        _, state, _ = create_state(config, Optimizer(name).build(parameters(config)), 0, mesh)
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer))
        here = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.optimizer))
        assert here < whole / 6, name  # what has no D stays whole: counts, and factors over D


def collectives(name: str, spec: str) -> list[tuple[str, str, str]]:
    """(kind, shapes, where in the model) of each collective of a training step."""
    step, *_ = prepare(name, spec)
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return re.findall(rf" = (\S.*?) ({kinds})(?:-start)?\(.*?op_name=\"([^\"]*)\"", step.as_text())


def test_fsdp_gathers_weights_and_never_moves_activations():
    moved = collectives("transformer-nano", "fsdp:8")
    assert {kind for _, kind, _ in moved} <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = [shape for shape, kind, _ in moved if kind == "all-gather"]
    assert len(gathered) > 10 and not any(re.match(r"\w+\[8,16\b", shape) for shape in gathered)  # [B, T, ...]
    assert not any("[8,16" in shape or "[1,16" in shape for shape, _, _ in moved)


def test_no_collective_in_the_loop_over_time():
    assert not [where for _, _, where in collectives("mamba-nano", "data:2,fsdp:2,tensor:2") if "while" in where]


def test_per_shard_sums_what_devices_share():
    """Rows and channels are split, the decay is shared by rows: values and gradients are those of one device."""
    def decayed(x, decay):
        return jax.lax.associative_scan(jnp.add, x * jnp.exp(-decay), axis=1), x.sum(1)

    x, decay = jax.random.normal(jax.random.key(0), (8, 4, 6)), jnp.linspace(0.1, 1, 6)
    loss = lambda run: lambda x, decay: sum(jnp.sum(y**2) for y in run(x, decay))
    expected = jax.value_and_grad(loss(decayed), (0, 1))(x, decay)
    for spec in ("data:8", "data:4,tensor:2", "fsdp:2,tensor:4"):  # 4 does not divide 6 channels
        with jax.set_mesh(make_mesh(spec)):
            run = per_shard(decayed, "BTF F", "BTF BF")
            chex.assert_trees_all_close(jax.jit(jax.value_and_grad(loss(run), (0, 1)))(x, decay), expected, rtol=1e-5)


def test_batches_lie_by_rows():
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    rows = global_batch(np.arange(16, dtype=np.int32).reshape(8, 2), mesh)
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(rows, np.arange(16).reshape(8, 2))
    with pytest.raises(ValueError, match="a batch of 6 rows does not divide over data:2, fsdp:2, expert:1"):
        global_batch(np.zeros((6, 2), np.int32), mesh)


def test_checkpoints_restore_onto_another_mesh(tmp_path):
    config = archlab.get_config("transformer-nano")
    run = Run(config, steps=2, batch=8, context=16)
    transform = run.optimizer.build(parameters(config))
    state_on = lambda spec, seed: create_state(config, transform, seed, make_mesh(spec))[1]
    saved = state_on("fsdp:8", 1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, saved, {}, run, 0.0)
    checkpoints.close()
    for spec in ("data:2,fsdp:2,tensor:2", "data:8"):
        target = state_on(spec, 2)
        restored = Checkpoints(tmp_path).restore(target, run).state
        chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(saved))
        assert jax.tree.map(lambda a: a.sharding, restored) == jax.tree.map(lambda a: a.sharding, target)


def test_collectives_are_read_from_the_program():
    """What each device sends, of collectives whose bytes are known: [16, 4] float32 of 256 bytes on each of eight."""
    spec = PartitionSpec("data")

    def moves(x):
        def turn(x, _):
            return jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]), None

        x = jax.lax.scan(turn, x, length=3)[0]
        x = x + jax.lax.psum(x, "data")
        x = x + jax.lax.psum_scatter(jax.lax.all_gather(x, "data", tiled=True) ** 2, "data", tiled=True)
        x = jax.lax.all_to_all(x, "data", 0, 0, tiled=True)
        return jax.lax.cond(x.sum() > 0, lambda x: jax.lax.pmax(x, "data"), lambda x: x, x)

    with jax.set_mesh(make_mesh("data:8")):
        run = jax.jit(jax.shard_map(moves, in_specs=spec, out_specs=spec, check_vma=False))
        program = run.lower(jnp.ones((128, 4))).compile()
    found = [(c.kind, c.bytes, c.times, c.certain) for c in read_collectives(program)]
    assert found == [
        ("collective-permute", 3 * 256, 3, True),
        ("all-reduce", 2 * 256 * 7 / 8, 1, True),
        ("all-gather", 7 * 256, 1, True),
        ("reduce-scatter", 8 * 256 * 7 / 8, 1, True),
        ("all-to-all", 256 * 7 / 8, 1, True),
        ("all-reduce", 2 * 256 * 7 / 8, 1, False),
    ]
