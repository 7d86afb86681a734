"""The MoE layer on meshes of eight devices against one device; run in a process of its own by test_parallel.py.

Prints one line for each case that was compared, and fails loudly. Everything is in float64, so that round-off flips no
choice of a router.
"""

import contextlib
import functools
import itertools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from archlab.analysis.collectives import collectives, computations_of
from archlab.experts import parallel
from archlab.experts.capacity import Capacity
from archlab.experts.dispatch import Experts
from archlab.experts.moe import MoE
from archlab.experts.parallel import run_experts
from archlab.experts.routers import TopK
from archlab.layers.contract import Place, Training
from archlab.layers.mlp import SwiGLU
from archlab.layers.sequence import Parallel
from archlab.parallel.mesh import make_mesh, parameter_shardings
from tests.helpers import cast, jittered, tokens_of

D = 12


def outcome(module, x, segments):
    """Output, losses, traces and gradients of one step in the training form."""
    def total(module, x):
        y, _, aux = module(x, tokens_of(segments, Training(jax.random.key(0), jnp.int32(0))))
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)) + aux.loss(), (y, aux.losses, aux.traces)

    (_, said), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(module, x)
    return said, jax.tree.leaves(grads)


def compare(name, config, batch, length, spec, forms=parallel.FORMS, crowd=False):
    """One case on a mesh, in some forms. crowd: all tokens want the same two experts."""
    module = jittered(cast(config.build(nnx.Rngs(0), Place(D)), jnp.float64))
    x = jax.random.normal(jax.random.key(1), (batch, length, D))
    if crowd:
        x, router = x.at[..., 0].set(30.0), module.router
        router.weight = router.weight.replace(router.weight[...].at[0].set(jnp.linspace(1, 0, config.experts)))
    segments = jnp.ones((batch, length), int).at[0, length * 2 // 3 :].set(0)
    want = jax.jit(outcome)(module, x, segments)
    if crowd:
        assert np.count_nonzero(want[0][2]["load"]) == config.router.k
    for form in forms:
        forced = functools.partial(run_experts, form="all-to-all" if form == "ragged" else form)
        with jax.set_mesh(make_mesh(spec)), mock.patch("archlab.experts.moe.run_experts", forced), \
                ragged_exchange() if form == "ragged" else contextlib.nullcontext():
            program = jax.jit(lambda *args: outcome(*args)).lower(module, x, segments)
            assert ("all_to_all" in program.as_text()) == (form in ("all-to-all", "ragged"))
            got = program.compile()(module, x, segments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), got, want)
        print(f"{name} on {spec}: {form}", flush=True)


def ragged_all_to_all(rows, output, starts, sizes, places, received, *, axis_name):
    """What JAX's documentation says `jax.lax.ragged_all_to_all` does, for one block a device."""
    everyone = lambda a: jax.lax.all_gather(a, axis_name)
    me, at, out = jax.lax.axis_index(axis_name), jnp.arange(len(output)), output
    rows, starts, sizes, places = map(everyone, (rows, starts, sizes, places))
    for device in range(len(sizes)):  # from each device the rows that it sends to this one
        row = at - places[device, me]
        arrives = (row >= 0) & (row < sizes[device, me])
        out = jnp.where(arrives[:, None], rows[device, jnp.clip(starts[device, me] + row, 0, len(at) - 1)], out)
    return jnp.where((received == sizes[:, me]).all(), out, jnp.nan)  # a size that was not announced is an error


@contextlib.contextmanager
def ragged_exchange():
    """`exchange` as on an accelerator, its collective emulated."""
    with mock.patch.object(parallel, "padded", lambda: False), \
            mock.patch("jax.lax.ragged_all_to_all", ragged_all_to_all):
        yield


def ragged_sends_what_there_is():
    """Only real rows arrive, and zeros for what else lies in a block."""
    draw = np.random.default_rng(0)
    sent = draw.integers(0, 4, (8, 8)).astype(np.int32)  # from, to
    rows = draw.normal(size=(8, 8, 3, 2))  # from, to, row, D
    spec = PartitionSpec("expert")
    with jax.set_mesh(make_mesh("expert:8")), ragged_exchange():
        move = lambda rows, sent, received: parallel.exchange(rows, sent[0], received[0])
        move = jax.shard_map(move, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
        arrived = move(rows.reshape(-1, 2), sent, sent.T)
    real = (np.arange(3) < sent[..., None])[..., None]
    np.testing.assert_array_equal(arrived, np.where(real, rows, 0).swapaxes(0, 1).reshape(-1, 2))
    print("the ragged exchange sends real rows alone")


def forms_send_what_they_say(tokens, k):
    """Bytes of both forms, counted in the compiled forward pass; and the form that sends less is taken."""
    weight = lambda *shape: jnp.ones(shape, jnp.float32)
    x, choice, up, down = weight(8, tokens, D), jnp.zeros((8, tokens, k), jnp.int32), weight(8, D, 4), weight(8, 4, D)
    experts = lambda up, down: Experts(up, None, down, None, None, None, "silu")
    sent = {}
    with jax.set_mesh(make_mesh("expert:8")):
        for form in (*parallel.FORMS, None):
            run = lambda x, choice, weights, *arrays: run_experts(x, choice, weights, experts(*arrays), None, form)
            program = jax.jit(run).lower(x, choice, weight(*choice.shape), up, down).compile()
            sent[form] = sum(c.bytes for c in collectives(program) if c.certain and c.kind != "all-reduce")
    row, room = D * 4, parallel.round_room(tokens * k, 8)
    names, choices = 4, k * (4 + 4)  # of the expert of each row; of the experts of each token, and their weights
    assert sent["all-to-all"] == 7 * room * (2 * row + names), sent
    assert sent["gather"] == 7 * tokens * (2 * row + choices), sent
    assert sent[None] == sent["gather" if tokens <= max(16, room) else "all-to-all"]
    print(f"{tokens} tokens a device, {k} of 8 experts each: bytes sent {sent}")


def shared_experts_wait_for_nothing():
    """In the compiled program no product of a shared expert stands before or after an exchange of the routed ones."""
    module = Parallel(MoE(8, 6), SwiGLU(40)).build(nnx.Rngs(0), Place(D))
    run = jax.jit(lambda module, x: module(x, tokens_of(jnp.ones(x.shape[:2], int)))[0])
    with jax.set_mesh(make_mesh("expert:8")):
        program = run.lower(module, jnp.ones((8, 24, D))).compile()
    computations, entry = computations_of(program)
    lines = computations[entry]
    before = {}  # all that each line waits for; lines stand in an order in which they could run
    for name, line in lines.items():
        operands = [other for other in line.names if other in lines]
        before[name] = {*operands}.union(*(before[other] for other in operands))
    exchanges = [name for name, line in lines.items() if line.op == "all-to-all"]
    products = [name for name, line in lines.items() if line.op in ("dot", "fusion")
                and re.search(r'op_name="[^"]*(BTD,DF->BTF|BTF,FD->BTD)/dot_general"', line.rest)]
    routers = [name for name, line in lines.items() if "BTD,DE->BTE/dot_general" in line.rest]
    assert len(exchanges) == 3 and len(products) == 3 and routers
    assert any(router in before[exchange] for router in routers for exchange in exchanges)
    for product, exchange in itertools.product(products, exchanges):
        assert product not in before[exchange] and exchange not in before[product]
    print("shared experts wait for nothing")


def experts_must_divide():
    module = nnx.eval_shape(lambda: MoE(6, 5).build(nnx.Rngs(0), Place(D)))
    with pytest.raises(ValueError, match="6 experts do not divide over expert:4"):
        parameter_shardings(module, make_mesh("data:2,expert:4"))
    with jax.set_mesh(make_mesh("data:2,expert:4")), pytest.raises(ValueError, match="6 experts .* expert:4"):
        jax.eval_shape(outcome, module, jax.ShapeDtypeStruct((8, 4, D), float), jax.ShapeDtypeStruct((8, 4), int))
    print("experts must divide")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    assert jax.device_count() == 8
    there, gather = parallel.FORMS
    compare("dropless", MoE(8, 6), 8, 6, "expert:8")
    compare("experts not spread", MoE(8, 6), 8, 6, "data:4,tensor:2", forms=[None])
    compare("biases", MoE(8, 6, bias=True), 8, 6, "fsdp:2,expert:2,tensor:2")
    capacity = MoE(8, 6, TopK(2, renormalise=True, jitter=0.1), Capacity(0.7), bias=True)
    compare("capacity", capacity, 8, 6, "data:2,expert:2,tensor:2")
    rounds = "three rounds, six experts receive nothing"
    compare(rounds, MoE(8, 6, bias=True), 8, 24, "data:2,expert:4", forms=[there, "ragged", gather], crowd=True)
    compare("rows that do not divide, no gate", MoE(8, 5, TopK(3), gated=False), 3, 5, "data:2,expert:4", forms=[there])
    compare("capacity, rows that do not divide", MoE(8, 6, TopK(1), Capacity(1.0)), 3, 5, "expert:8", forms=[gather])
    compare("one token", MoE(8, 6), 2, 1, "data:2,fsdp:2,expert:2", forms=[gather])
    compare("shared experts", Parallel(MoE(8, 6), SwiGLU(6)), 8, 6, "fsdp:2,expert:4", forms=[there])
    ragged_sends_what_there_is()
    forms_send_what_they_say(tokens=64, k=2)
    forms_send_what_they_say(tokens=64, k=4)
    forms_send_what_they_say(tokens=1, k=2)
    shared_experts_wait_for_nothing()
    experts_must_divide()
