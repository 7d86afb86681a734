"""The MoE layer on meshes of eight devices against one device; run in a process of its own by test_parallel.py.

Prints one line for each case that was compared, and fails loudly.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.contract import Place, Training
from tests.helpers import cast, tokens_of

AXES = ("data", "fsdp", "expert", "tensor")
D = 12


def outcome(module, x, segments):
    """Output, losses, traces and gradients of one step in the training form."""
    def total(module, x):
        y, _, aux = module(x, tokens_of(segments, Training(jax.random.key(0), jnp.int32(0))))
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)) + aux.loss(), (y, aux)

    (_, (y, aux)), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(module, x)
    return y, aux, [g for g in jax.tree.leaves(grads)]


def compare(name, config, batch, length, *meshes, crowd=False):
    """One case on some meshes. crowd: all tokens want the same two experts."""
    module = cast(config.build(nnx.Rngs(0), Place(D)), jnp.float64)
    x = jax.random.normal(jax.random.key(1), (batch, length, D))
    if crowd:
        x = x.at[..., 0].set(30.0)
        module.router = module.router.replace(module.router[...].at[0].set(jnp.linspace(1, 0, config.experts)))
    segments = jnp.ones((batch, length), int).at[0, length * 2 // 3 :].set(0)
    want = jax.jit(outcome)(module, x, segments)
    for sizes in meshes:
        mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4)
        with jax.set_mesh(mesh):
            program = jax.jit(outcome).lower(module, x, segments)
            assert ("all_to_all" in program.as_text()) == (sizes[2] > 1 and config.experts % sizes[2] == 0)
            got = program.compile()(module, x, segments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), got, want)
        print(name, sizes, flush=True)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    assert jax.device_count() == 8
    compare("dropless", MoE(8, 6), 8, 6, (1, 1, 8, 1), (2, 1, 4, 1), (2, 2, 2, 1), (1, 1, 4, 2), (4, 1, 1, 2))
    compare("capacity", MoE(8, 6, capacity_factor=0.7, jitter=0.1), 8, 6, (2, 2, 2, 1), (1, 1, 4, 2))
    compare("several rounds, six experts receive nothing", MoE(8, 6), 8, 6, (1, 1, 8, 1), (2, 1, 4, 1), crowd=True)
    compare("rows that do not divide", MoE(8, 6, TopK(3)), 3, 5, (2, 1, 4, 1))
    compare("capacity, rows that do not divide", MoE(8, 6, TopK(1), capacity_factor=1.0), 3, 5, (1, 1, 8, 1))
    compare("one token", MoE(8, 6), 2, 1, (2, 2, 2, 1))
    compare("experts that do not divide, no gate", MoE(6, 5, gated=False), 8, 4, (1, 1, 4, 2))
