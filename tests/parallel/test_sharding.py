"""Letters to places: the table, what is left out and reported, and meshes from words. No device is needed."""

import logging

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from archlab.layers import sharding
from archlab.layers.sharding import constrain, partition, per_shard
from archlab.parallel.mesh import AXES, make_mesh


def mesh_of(**sizes) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize("letters, shape, sizes, expected", [
    ("D->F", (32, 64), dict(fsdp=4, tensor=2), ("fsdp", "tensor")),
    ("F->D", (64, 32), dict(fsdp=4, tensor=2), ("tensor", "fsdp")),
    ("LD->HK", (6, 32, 4, 8), dict(fsdp=4, tensor=2), (None, "fsdp", "tensor", None)),
    ("D->GK", (32, 2, 8), dict(fsdp=4, tensor=2), ("fsdp", "tensor", None)),
    ("D->GK", (32, 1, 8), dict(fsdp=4, tensor=2), ("fsdp", None, None)),  # one head: the axis does not divide it
    ("V->D", (256, 32), dict(fsdp=8), (None, "fsdp")),
    ("ED->F", (8, 32, 64), dict(expert=4, fsdp=2), ("expert", "fsdp", None)),
    ("D->E", (32, 6), dict(expert=4), (None, None)),  # a router's outputs need not divide
    ("D->D", (32, 32), dict(fsdp=8), ("fsdp", None)),  # an axis splits one dimension only
    ("->N", (16,), dict(fsdp=8), (None,)),
    ("BTD", (16, 8, 32), dict(data=2, fsdp=2, expert=2, tensor=1), (("data", "fsdp", "expert"), None, None)),
    ("BTF", (4, 8, 32), dict(data=2, fsdp=4, tensor=1), ("data", None, None)),  # 8 does not divide 4 rows, 2 does
    ("BT.", (1, 8, 32), dict(data=8), (None, None, None)),
])
def test_letters_to_axes(letters, shape, sizes, expected):
    assert partition(letters, shape, mesh_of(**sizes)) == PartitionSpec(*expected)


@pytest.mark.parametrize("letters, shape", [("ED->F", (6, 32, 64)), ("LEF->D", (2, 6, 64, 32)), ("E->F", (6, 64))])
def test_experts_must_divide(letters, shape):
    with pytest.raises(ValueError, match="6 experts do not divide over expert:4"):
        partition(letters, shape, mesh_of(expert=4))


def test_what_is_left_out_is_reported_once(caplog):
    sharding.report.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            partition("D->F", (30, 60), mesh_of(fsdp=4, tensor=2))
            partition("D->D", (32, 32), mesh_of(fsdp=4))
    reports = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert reports == [("WARNING", "'D->F': D = 30 does not divide by 4, so it is not split over fsdp:4"),
                       ("INFO", "'D->D': fsdp splits an earlier dimension, so not D = 32")]


def test_axes_of_an_enclosing_shard_map_are_left_alone():
    mesh = AbstractMesh((2, 2, 1, 1), AXES, axis_types=(AxisType.Manual, *(AxisType.Auto,) * 3))
    assert partition("BTD", (8, 4, 32), mesh) == PartitionSpec("fsdp", None, None)


def test_nothing_happens_without_a_mesh():
    x = jax.numpy.ones((4, 2, 8))
    assert constrain(x, "BTD") is x
    assert per_shard(lambda a: a, "BTD", "BTD")(x) is x


def test_mesh_of_one_device():
    for spec in (None, "", "data:1", "tensor:1, data:1"):
        mesh = make_mesh(spec, jax.devices()[:1])
        assert mesh.axis_names == AXES and mesh.size == 1
        assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("spec, words", [
    ("dada:1", "no axis 'dada'; did you mean data"),
    ("data:1,data:1", "named twice"),
    ("data:two", "'two' of data must be a positive integer"),
    ("data", "'' of data must be a positive integer"),
    ("data:0", "must be a positive integer"),
    ("data:-1", "must be a positive integer"),
    ("data:2,fsdp:4", "2 x 4 x 1 x 1 = 8 devices; there are 1"),
])
def test_bad_meshes_are_refused(spec, words):
    with pytest.raises(ValueError) as error:
        make_mesh(spec, jax.devices()[:1])
    assert words in str(error.value)
