"""Expert parallelism: each device of a group holds E / devices experts, and tokens meet them in one of two forms.

On a mesh every device has rows of the batch (split over data, fsdp and expert jointly), the whole of its experts'
input dimension and, on a tensor axis, a part of their hidden one. A group is what lies along the expert axis.

    all-to-all  rows travel to the device that holds their expert, and their outputs back (GShard, arXiv:2006.16668).
                With a capacity one exchange each way of the buffers [E, B * capacity, D], whose size it bounds.
                Dropless, in rounds with room for twice an even share. The first round nearly always carries
                everything; further ones run only while the busiest device has more to send, on all devices alike.
                At worst, all slots for one device, devices / 2 rounds: nothing is lost whatever the router does, and
                memory stays at twice an even share.
    gather      every device gets all tokens of its group, runs its own experts on what is theirs, and the outputs are
                added up where the tokens came from (all-gather, reduce-scatter).

Each form sends rows of D numbers to each other device, there and back: 2 * (devices - 1) * rows * D numbers in all. To
gather, the rows are all its tokens; in an all-to-all its room, or where only real rows travel (`exchange`) an even
share of the choices. The form that sends fewer is chosen: gathering for the few tokens of a decode step, and where a
token goes to about as many experts as there are devices (half as many, where whole rooms travel).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from archlab.experts.capacity import with_capacity
from archlab.experts.dispatch import Experts, dropless, each_expert, plan, rank_in_group, through
from archlab.layers.alphabet import MESH_AXES
from archlab.layers.sharding import free_axes, partition

FORMS = ("all-to-all", "gather")
SLACK = 2  # a round's room, in even shares
LEAST = 16  # and in rows: fewer would often need a second round, and gain no time
LETTERS = {"up": "E.->F", "gate": "E.->F", "down": "EF->.", "up_bias": "E->F", "gate_bias": "E->F",
           "down_bias": "E->."}  # of what `Experts` holds; D is whole inside


def run_experts(x: Float[Array, "B T D"], experts: Int[Array, "B T k"], weights: Float[Array, "B T k"],
                params: Experts, capacity: int | None, form: str | None = None) -> Float[Array, "B T D"]:
    """The experts' outputs, added up by weight: on one device, or on the mesh in context (`jax.set_mesh`).

    Rows are padded where the mesh does not divide them. ValueError where its expert axis does not divide the experts.

    Args: experts: E for "nobody"; capacity: None for dropless, else no expert was chosen by more tokens of a row;
      form: one of `FORMS`, None for the one that sends less.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = free_axes(mesh)
    if not axes:
        return _own_experts(x, experts, weights, params, capacity)
    arrays = {name: getattr(params, name) for name in LETTERS if getattr(params, name) is not None}
    places = {name: partition(LETTERS[name], array.shape, mesh) for name, array in arrays.items()}
    rows = tuple(axis for axis in MESH_AXES["B"] if axis in axes)
    pad = -len(x) % math.prod(axes[axis] for axis in rows)
    widen = lambda a, value=0: jnp.pad(a, ((0, pad), (0, 0), (0, 0)), constant_values=value)
    parts = places["up"][2]  # the axis that splits F: each of its devices then has a part of every sum

    def local(x, experts, weights, arrays):
        if parts and "down_bias" in arrays:
            first = jax.lax.axis_index(parts) == 0
            arrays = arrays | {"down_bias": jnp.where(first, arrays["down_bias"], 0)}
        y = _on_group(x, experts, weights, params._replace(**arrays), capacity, axes, form)
        return jax.lax.psum(y, parts) if parts else y

    split = PartitionSpec(rows)
    # check_vma=False: arguments that devices share then count as one, and their gradient is summed at this door.
    run = jax.shard_map(local, in_specs=(split, split, split, places), out_specs=split, axis_names={*axes},
                        check_vma=False)
    return run(widen(x), widen(experts, len(params.up)), widen(weights), arrays)[: len(x)]


def _on_group(x, experts, weights, params: Experts, capacity: int | None, axes: dict[str, int], form: str | None):
    """One device's rows, through the experts of its group, of which it holds `params`."""
    devices, own, tokens = axes.get("expert", 1), len(params.up), x.shape[0] * x.shape[1]
    if devices == 1:
        return _own_experts(x, experts, weights, params, capacity)
    room = round_room(experts.size, devices) if capacity is None else own * len(x) * capacity
    form = form or cheaper_form(tokens, room if capacity is not None or padded() else experts.size // devices)
    if form == "gather":
        return _gathered(x, experts, weights, params, capacity, room=SLACK * experts.size)
    swap = lambda a, split=0, join=0: jax.lax.all_to_all(a, "expert", split, join, tiled=True)
    if capacity is not None:  # [E, B * capacity, D] there, [own, devices * B * capacity, D] here
        visit = lambda buffer: swap(each_expert(swap(buffer, 0, 1), params), 1, 0)
        return with_capacity(x, experts, weights, own * devices, capacity, visit)

    def visit(rows, names):
        here, count = swap(names), lambda names: (names.reshape(devices, room) < own).sum(1, dtype=jnp.int32)
        y = _each_row(exchange(rows, count(names), count(here)), here, params)
        return exchange(y, count(here), count(names))

    return _in_rounds(x, experts, weights, own, devices, room, visit, tuple(axes))


def round_room(slots: int, devices: int) -> int:
    """How many rows a device may send to each other one in a round."""
    return min(slots, max(LEAST, math.ceil(SLACK * slots / devices)))


def cheaper_form(tokens: int, rows: int) -> str:
    """The form that sends fewer rows to each other device: all `tokens`, or the `rows` of an all-to-all."""
    return "gather" if tokens <= max(LEAST, rows) else "all-to-all"


def padded() -> bool:
    """Whether an all-to-all sends whole rooms: CPUs have no ragged one."""
    return jax.default_backend() == "cpu"


def exchange(rows: Float[Array, "R D"], sent: Int[Array, "devices"], received: Int[Array, "devices"]) -> jax.Array:
    """The d-th of equal blocks of `rows` to device d; the blocks that come, in the order of their devices: [R, D].

    Only the first `sent[d]` rows of a block are real: a ragged all-to-all sends no others, and leaves zeros for them.
    """
    if padded():
        return jax.lax.all_to_all(rows, "expert", 0, 0, tiled=True)
    starts = jnp.arange(len(sent), dtype=jnp.int32) * (len(rows) // len(sent))
    mine = jnp.broadcast_to(starts[jax.lax.axis_index("expert")], starts.shape)  # my block on every device
    return jax.lax.ragged_all_to_all(rows, jnp.zeros_like(rows), starts, sent, mine, received, axis_name="expert")


def _gathered(x, experts, weights, params: Experts, capacity: int | None, room: int):
    """The gather form."""
    everyone = lambda a: jax.lax.all_gather(a, "expert", tiled=True)
    own = len(params.up)
    number = everyone(experts) - jax.lax.axis_index("expert") * own
    mine = jnp.where((number >= 0) & (number < own), number, own)
    args = everyone(x), mine, everyone(weights)
    if capacity is not None or mine.size <= room:
        y = _own_experts(*args, params, capacity)
    else:  # most of these slots are others': no memory for all of them
        y = _in_rounds(*args, own, 1, room, lambda rows, names: _each_row(rows, names, params))
    return jax.lax.psum_scatter(y, "expert", tiled=True)


def _in_rounds(x, experts, weights, own: int, groups: int, room: int, visit: Callable, axes: tuple[str, ...] = ()):
    """Every slot's row once through `visit(rows [groups * room, D], names of their experts in their group)`.

    Args: own: how many experts are a group; room: rows of a group in a round; axes: of the devices that go on together.
    """
    shape, (x, experts, weights) = x.shape, (a.reshape(-1, a.shape[-1]) for a in (x, experts, weights))
    flat, rounds = experts.reshape(-1), math.ceil(experts.size / room)
    group = jnp.minimum(flat // own, groups)
    rank, load = rank_in_group(group, groups)

    def send(r):
        now = (rank // room == r) & (group < groups)
        journey = plan(jnp.where(now, group * room + rank % room, groups * room), groups * room)
        names = jnp.take(flat % own, journey.slots, mode="fill", fill_value=own)
        return through(journey, x, weights, lambda rows: visit(rows, names))

    def later(y, r):
        return y + jax.lax.cond(r * room < busiest, send, lambda r: jnp.zeros_like(x), r), None

    busiest = jax.lax.pmax(load.max(), axes) if axes else load.max()
    y = send(0)
    y = jax.lax.scan(jax.checkpoint(later), y, jnp.arange(1, rounds))[0] if rounds > 1 else y
    return y.reshape(shape)


def _own_experts(x, experts, weights, params: Experts, capacity: int | None):
    """Experts that are all here."""
    if capacity is not None:
        return with_capacity(x, experts, weights, len(params.up), capacity, lambda rows: each_expert(rows, params))
    flat = lambda a: a.reshape(-1, a.shape[-1])
    return dropless(flat(x), flat(experts), flat(weights), params).reshape(x.shape)


def _each_row(rows, names, params: Experts):
    return dropless(rows, names[:, None], jnp.ones((len(rows), 1), rows.dtype), params)
