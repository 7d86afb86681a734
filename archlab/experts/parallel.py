"""Expert parallelism: tokens travel to the device that holds their expert, and back (GShard, arXiv:2006.16668).

On a mesh every device has rows of the batch (split over data, fsdp and expert jointly), the whole of E / expert_axis
experts' input dimension and, on a tensor axis, a part of their hidden one. Within a group along the expert axis:

    with a capacity   one all-to-all each way of the buffers [E, rows * capacity, D], whose size the capacity bounds
    dropless          rounds of all-to-alls with room for twice an even share. The first round nearly always carries
                      everything; further ones run only while the busiest device has more to send, on all devices
                      alike. At worst, all slots for one device, expert_axis / 2 rounds: nothing is lost whatever the
                      router does, and memory stays at twice an even share.

An accelerator's ragged all-to-all would send exactly what there is; it does not exist on CPUs.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from archlab.experts.capacity import each_expert, with_capacity
from archlab.experts.dispatch import Experts, dropless, plan, rank_in_group, through
from archlab.layers.alphabet import MESH_AXES
from archlab.layers.sharding import free_axes, partition

SLACK = 2  # a round's room, in even shares


def run_experts(x: Float[Array, "B T D"], experts: Int[Array, "B T k"], weights: Float[Array, "B T k"],
                params: Experts, capacity: int | None) -> Float[Array, "B T D"]:
    """The experts' outputs, added up by weight: on one device, or on the mesh in context (`jax.set_mesh`).

    Rows are padded where the mesh does not divide them; where it does not divide the experts, every device holds all.

    Args: experts: E for "nobody"; capacity: None for dropless, else the choices have passed `fit`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = free_axes(mesh)
    if not axes:
        return _local(x, experts, weights, params, capacity, 1, ())
    into, out = partition("E.F", params.up.shape, mesh), partition("EF.", params.down.shape, mesh)
    rows = tuple(axis for axis in MESH_AXES["B"] if axis in axes)
    pad = -len(x) % math.prod(axes[axis] for axis in rows)
    widen = lambda a, value=0: jnp.pad(a, ((0, pad), (0, 0), (0, 0)), constant_values=value)

    def local(x, experts, weights, up, gate, down):
        mine = params._replace(up=up, gate=gate, down=down)
        y = _local(x, experts, weights, mine, capacity, axes["expert"] if into[0] else 1, tuple(axes))
        return jax.lax.psum(y, "tensor") if into[2] else y

    split = PartitionSpec(rows)
    # check_vma=False: arguments that devices share then count as one, and their gradient is summed at this door.
    run = jax.shard_map(local, in_specs=(split, split, split, into, into, out), out_specs=split, axis_names={*axes},
                        check_vma=False)
    nobody = len(params.up)
    return run(widen(x), widen(experts, nobody), widen(weights), params.up, params.gate, params.down)[: len(x)]


def _local(x, experts, weights, params: Experts, capacity: int | None, devices: int, axes: tuple[str, ...]):
    """One device's rows, through experts of which each of `devices` holds an equal share, in order."""
    if capacity is not None:
        visit = lambda buffer: _visit(buffer, params, devices)
        return with_capacity(x, experts, weights, len(params.up) * devices, capacity, visit)
    flat = lambda a: a.reshape(-1, a.shape[-1])
    return _in_rounds(flat(x), flat(experts), flat(weights), params, devices, axes).reshape(x.shape)


def _visit(buffer, params: Experts, devices: int):
    """Buffers [E, R, D] to the devices that hold the experts, through these, and back."""
    if devices == 1:
        return each_expert(buffer, params)
    there = jax.lax.all_to_all(buffer, "expert", 0, 1, tiled=True)  # [E / devices, devices * R, D]
    return jax.lax.all_to_all(each_expert(there, params), "expert", 1, 0, tiled=True)


def _in_rounds(x, experts, weights, params: Experts, devices: int, axes: tuple[str, ...]):
    """`dropless` over the devices that hold the experts."""
    if devices == 1:
        return dropless(x, experts, weights, params)
    own, slots = len(params.up), experts.size
    room = min(slots, math.ceil(SLACK * slots / devices))
    group = jnp.minimum(experts.reshape(-1) // own, devices)  # the device of each slot
    rank, load = rank_in_group(group, devices)
    busiest = jax.lax.pmax(load.max(), axes)
    swap = lambda a: jax.lax.all_to_all(a, "expert", 0, 0, tiled=True)

    def send(r):
        now = (rank // room == r) & (group < devices)
        journey = plan(jnp.where(now, group * room + rank % room, devices * room), devices * room)
        names = jnp.take(experts.reshape(-1) % own, journey.slots, mode="fill", fill_value=own)

        def compute(rows):
            return swap(dropless(swap(rows), swap(names)[:, None], jnp.ones((len(rows), 1), weights.dtype), params))

        return through(journey, x, weights, compute)

    def later(y, r):
        return y + jax.lax.cond(r * room < busiest, send, lambda r: jnp.zeros_like(x), r), None

    y = send(0)
    rounds = math.ceil(slots / room)
    return jax.lax.scan(jax.checkpoint(later), y, jnp.arange(1, rounds))[0] if rounds > 1 else y
