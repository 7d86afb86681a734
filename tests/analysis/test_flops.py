"""Counted operations against sums done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.analysis.flops import Flops, count


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_matrix_product_counts_two_operations_a_term():
    assert count(jnp.matmul, f32(3, 5), f32(5, 7)) == Flops(matmul=2 * 3 * 5 * 7)
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), f32(4, 3, 5), f32(4, 5, 7)).matmul == 2 * 4 * 3 * 5 * 7


def test_elements_count_one_and_moves_nothing():
    assert count(lambda x: jnp.exp(x) + 1, f32(4, 6)) == Flops(elementwise=48)
    assert count(lambda x: x.sum(0), f32(4, 6)).elementwise == 24
    assert count(lambda x: x.T.reshape(-1)[::2].astype(jnp.bfloat16), f32(4, 6)) == Flops()
    assert count(lambda i: (i + 1) * 3, jax.ShapeDtypeStruct((9,), jnp.int32)) == Flops()
    assert count(lambda x, y: x.at[jnp.array([1, 2])].add(y), f32(100), f32(2)).elementwise == 2


@pytest.mark.parametrize("length", [1, 7])
def test_a_scan_counts_its_body_times_its_length(length):
    def loop(x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ h), None), x, length=length)[0]

    assert count(loop, f32(4, 4)) == Flops(matmul=length * 2 * 64, elementwise=length * 16)
    nested = lambda x: jax.lax.map(loop, x)
    assert count(nested, f32(5, 4, 4)).matmul == 5 * length * 2 * 64


def test_inner_programs_are_entered():
    square = lambda x: x @ x
    custom_vjp = jax.custom_vjp(square)
    custom_vjp.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    custom_jvp = jax.custom_jvp(square)
    custom_jvp.defjvp(lambda p, t: (custom_jvp(*p), t[0]))
    for fn in (jax.jit(square), jax.checkpoint(square), custom_vjp, custom_jvp):
        assert count(fn, f32(4, 4)) == Flops(matmul=2 * 64)
    assert count(jax.value_and_grad(lambda x: custom_vjp(x).sum()), f32(4, 4)).matmul == 3 * 2 * 64


def test_the_dearer_branch_of_a_conditional_counts_or_the_one_asked_for():
    branch = lambda p, x: jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x)
    args = jax.ShapeDtypeStruct((), bool), f32(4, 4)
    for cond, products in ((max, 2), (min, 1), (lambda branches: branches[0], 1), (lambda branches: branches[1], 2)):
        assert count(branch, *args, cond=cond).matmul == products * 2 * 64
    assert count(branch, *args) == count(branch, *args, cond=max)
    often = lambda p, x: jax.lax.scan(lambda x, _: (jax.jit(branch)(p, x), None), x, length=5)[0]
    assert count(often, *args, cond=min).matmul == 5 * 2 * 64
    switch = lambda i, x: jax.lax.switch(i, [lambda x: x @ x, jnp.exp, lambda x: x], x)
    mean = lambda branches: sum(branches, Flops()) / len(branches)
    assert count(switch, jax.ShapeDtypeStruct((), int), f32(4, 4), cond=mean) == Flops(2 * 64 / 3, 16 / 3)


def test_what_no_result_depends_on_does_not_count():
    two = lambda x: (x @ x, jnp.exp(x))
    scan = lambda x: jax.lax.scan(lambda h, _: (jnp.tanh(h), h @ h), x, length=3)
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, two, lambda x: (x, x), x)
    for fn, elementwise in ((two, 16), (jax.jit(two), 16), (jax.checkpoint(two), 16), (branch, 16)):
        assert count(lambda x: fn(x)[1], f32(4, 4)) == Flops(elementwise=elementwise)
        assert count(fn, f32(4, 4)) == Flops(2 * 64, elementwise)
    assert count(lambda x: scan(x)[0], f32(4, 4)) == Flops(elementwise=3 * 16)
    # A gradient that nobody asks for, and what only its own backward pass would have read.
    grad = jax.grad(lambda a, b: (a @ b).sum(), (0, 1))
    assert count(lambda a, b: grad(a, b)[0], f32(4, 4), f32(4, 4)).matmul == 2 * 64


def test_one_turn_of_a_while_loop_counts():
    loop = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x)
    assert count(loop, f32(4, 4)).matmul == 2 * 64
    assert count(lambda x: jax.lax.fori_loop(0, 6, lambda i, x: x @ x, x), f32(4, 4)).matmul == 6 * 2 * 64


def test_ragged_products_count_rows_and_not_groups():
    rows, d, f, groups = 40, 6, 10, 8
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    once = 2 * rows * d * f
    assert count(jax.lax.ragged_dot, f32(rows, d), f32(groups, d, f), sizes).matmul == once
    gradient = jax.value_and_grad(lambda x, w, s: jax.lax.ragged_dot(x, w, s).sum(), (0, 1))
    assert count(gradient, f32(rows, d), f32(groups, d, f), sizes).matmul == 3 * once
    custom = jax.custom_vjp(lambda x, w, s: jax.lax.ragged_dot(x, w, s))
    custom.defvjp(lambda x, w, s: (custom(x, w, s), (x, w)), lambda r, g: (*r, None))
    assert count(custom, f32(rows, d), f32(groups, d, f), sizes).matmul == once


def test_a_triangular_system_counts_a_square_for_each_right_hand_side():
    for left, b in ((True, f32(3, 4, 6)), (False, f32(3, 6, 4))):
        solve = lambda a, b, left=left: jax.lax.linalg.triangular_solve(a, b, left_side=left, lower=True)
        assert count(solve, f32(3, 4, 4), b).matmul == 3 * 4 * 4 * 6


def test_convolutions():
    conv = lambda x, w, groups: jax.lax.conv_general_dilated(x, w, (1,), "VALID", feature_group_count=groups)
    assert count(lambda x, w: conv(x, w, 1), f32(2, 6, 20), f32(8, 6, 3)).matmul == 2 * (2 * 8 * 18) * (6 * 3)
    assert count(lambda x, w: conv(x, w, 6), f32(2, 6, 20), f32(6, 1, 3)).matmul == 2 * (2 * 6 * 18) * 3


def test_every_device_of_a_shard_map_counts():
    mesh = jax.sharding.AbstractMesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    fn = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(jax.P("a"), jax.P()), out_specs=jax.P("a"),
                       axis_names={"a"})
    assert count(fn, f32(8, 5), f32(5, 3)).matmul == 2 * 8 * 5 * 3


def test_a_pallas_kernel_counts_once_for_each_point_of_its_grid():
    from jax.experimental import pallas as pl

    def kernel(x, y, out):
        out[...] = jnp.dot(x[...], y[...])

    block = lambda i: (i, 0)
    call = pl.pallas_call(kernel, grid=(4,), out_shape=f32(32, 8), interpret=True,
                          in_specs=[pl.BlockSpec((8, 16), block), pl.BlockSpec((16, 8), lambda i: (0, 0))],
                          out_specs=pl.BlockSpec((8, 8), block))
    assert count(call, f32(32, 16), f32(16, 8)).matmul == 2 * 32 * 16 * 8


def test_complex_numbers_and_transforms():
    c64 = jax.ShapeDtypeStruct((4, 4), jnp.complex64)
    assert count(jnp.matmul, c64, c64).matmul == 4 * 2 * 64
    assert count(jnp.multiply, c64, c64).elementwise == 6 * 16
    assert count(jnp.fft.fft, jax.ShapeDtypeStruct((3, 8), jnp.complex64)).elementwise == 5 * 3 * 8 * 3


def test_counts_agree_with_the_compiler_where_it_has_no_loops():
    def mlp(x, a, b):
        return jax.nn.relu(x @ a) @ b

    args = f32(32, 64), f32(64, 128), f32(128, 64)
    told = jax.jit(mlp).lower(*args).compile().cost_analysis()["flops"]
    np.testing.assert_allclose(count(mlp, *args).total, told, rtol=0.02)
