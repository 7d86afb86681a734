"""Every way to bring tokens to experts against the oracle that runs all experts on all tokens."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.experts.capacity import Capacity
from archlab.experts.dispatch import Experts, buffers_first, dense, dropless, rank_in_group, sorted_blocks
from archlab.experts.grouped import grouped_dot, kernel, ragged_dot
from archlab.experts.parallel import run_experts

D, F = 6, 10


def problem(N, E, k, seed=0, gated=True, bias=False):
    """Tokens, distinct experts for each (some nobody's), weights and the experts' matrices, in float64."""
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    draw = lambda *shape: jax.random.normal(next(keys), shape)
    x, weights, logits = draw(N, D), jax.nn.softmax(draw(N, k)), draw(N, E)
    biases = (draw(E, F), draw(E, F), draw(E, D)) if bias else (None, None, None)
    params = Experts(draw(E, D, F), draw(E, D, F) if gated else None, draw(E, F, D), *biases, "silu")
    experts = jax.lax.top_k(logits + jnp.linspace(0, 3, E), k)[1].astype(jnp.int32)
    return x, jnp.where(jnp.arange(N)[:, None] % 7 == 3, E, experts), weights, params


def with_gradients(form, x, experts, weights, params):
    """The output and the gradients of a weighted sum of it, with respect to everything that has one."""
    def total(x, weights, matrices):
        y = form(x, experts, weights, params._replace(**matrices))
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    matrices = {name: value for name, value in params._asdict().items() if isinstance(value, jax.Array)}
    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(x, weights, matrices)


@pytest.mark.parametrize("N, E, k", [(40, 5, 2), (150, 3, 1), (30, 1, 1), (3, 8, 2), (17, 64, 4)])
def test_dropless_equals_dense(float64, N, E, k):
    """Blocks of several sizes, experts that receive nothing, and few enough slots to fetch each one's weights."""
    args = problem(N, E, k, bias=N > 10)
    chex.assert_trees_all_close(with_gradients(dropless, *args), with_gradients(dense, *args), rtol=1e-10, atol=1e-10)


def test_biases_of_few_slots(float64):
    """The form that fetches weights fetches biases."""
    args = problem(3, 8, 2, bias=True)
    chex.assert_trees_all_close(with_gradients(dropless, *args), with_gradients(dense, *args), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", [sorted_blocks, buffers_first])
@pytest.mark.parametrize("crowd", [0, 20, 100])
def test_uneven_loads(float64, form, crowd):
    """Buffers with room for all, and with a few or with most slots left over; some tokens have nobody."""
    x, experts, weights, params = problem(120, 4, 2, bias=True)
    experts = jnp.where(jnp.arange(120)[:, None] < crowd, jnp.array([1, 3]), experts)
    even = jnp.stack([jnp.arange(120) % 4, (jnp.arange(120) + 1) % 4], 1)
    args = x, experts if crowd else even, weights, params
    chex.assert_trees_all_close(with_gradients(form, *args), with_gradients(dense, *args), rtol=1e-10, atol=1e-10)


def test_all_on_one_expert(float64):
    x, experts, weights, params = problem(300, 4, 1, gated=False)
    experts = jnp.full_like(experts, 2)
    args = x, experts, weights, params
    chex.assert_trees_all_close(with_gradients(dropless, *args), with_gradients(dense, *args), rtol=1e-10, atol=1e-10)


def test_capacity_that_fits_all_equals_dense(float64):
    x, experts, weights, params = problem(40, 5, 2, bias=True)
    rows = lambda a: a.reshape(4, 10, -1)

    def form(x, experts, weights, params):
        return run_experts(rows(x), rows(experts), rows(weights), params, capacity=10).reshape(x.shape)

    want = with_gradients(dense, x, experts, weights, params)
    chex.assert_trees_all_close(with_gradients(form, x, experts, weights, params), want, rtol=1e-10, atol=1e-10)


def test_capacity_drops_what_fit_dropped(float64):
    x, experts, weights, params = problem(40, 5, 2)
    rows = lambda a: a.reshape(4, 10, -1)
    kept = Capacity(1.0).fit(rows(experts), jnp.ones((4, 10, 5)), jnp.full(4, 3))[1]
    assert (kept != rows(experts)).any()
    got = run_experts(rows(x), kept, rows(weights), params, capacity=3).reshape(x.shape)
    np.testing.assert_allclose(got, dense(x, kept.reshape(40, 2), weights, params), rtol=1e-10, atol=1e-12)


def test_rank_in_group():
    rank, sizes = rank_in_group(jnp.array([2, 0, 2, 3, 0, 2], jnp.int32), 3)
    assert rank.tolist() == [0, 0, 1, 0, 1, 2] and sizes.tolist() == [2, 0, 3]


def test_grouped_products_agree(float64):
    """The loop, its own gradient, and `ragged_dot`, against one product for each block; the last is nobody's."""
    keys = jax.random.split(jax.random.key(0), 3)
    rows, weight = jax.random.normal(keys[0], (24, D)), jax.random.normal(keys[1], (4, D, F))
    cotangent, experts = jax.random.normal(keys[2], (24, F)), jnp.array([0, 0, 1, 3, 3, 4])
    own = lambda rows, weight, i: rows[4 * i : 4 * i + 4] @ weight[experts[i]] if i < 5 else jnp.zeros((4, F))
    plain = lambda rows, weight: jnp.concatenate([own(rows, weight, i) for i in range(6)])
    want, pull = jax.vjp(plain, rows, weight)
    for form in (grouped_dot, ragged_dot):
        got, pull_form = jax.vjp(lambda rows, weight: form(rows, weight, experts), rows, weight)
        chex.assert_trees_all_close((got, pull_form(cotangent)), (want, pull(cotangent)), rtol=1e-12, atol=1e-12)


def test_tokamax_is_taken_where_it_is_installed():
    tokamax = pytest.importorskip("tokamax")
    assert kernel() is tokamax.ragged_dot


def test_bfloat16_stays_and_gradients_keep_the_weights_precision():
    x, experts, weights, params = problem(64, 4, 2)
    params = jax.tree.map(lambda a: a if isinstance(a, str) else a.astype(jnp.float32), params)
    grads, y = with_gradients(dropless, x.astype(jnp.bfloat16), experts, weights.astype(jnp.float32), params)
    assert y.dtype == jnp.bfloat16 and grads[0].dtype == jnp.bfloat16 and grads[2]["up"].dtype == jnp.float32
    want = dense(x.astype(jnp.float32), experts, weights.astype(jnp.float32), params)
    assert jnp.abs(y.astype(jnp.float32) - want).max() < 0.03 * jnp.abs(want).max()
