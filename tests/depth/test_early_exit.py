"""A step at which no token runs any more: its work is saved, and nothing comes out different."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.analysis.flops import count
from archlab.attention.attention import Attention
from archlab.depth.coordinates import Coordinates
from archlab.depth.halting import ACT
from archlab.depth.recur import Recur
from archlab.experts.moe import MoE
from archlab.layers.config import LayerConfig
from archlab.layers.contract import Aux, Layer, Place, Training
from archlab.layers.mlp import SwiGLU
from archlab.layers.residual import Residual
from archlab.layers.sequence import Provide, Sequence
from archlab.recurrence.mamba2 import Mamba2
from tests.helpers import cast, jittered, tokens_of

B, T, D, N = 2, 7, 8, 3
BLOCK = Sequence(Residual(Attention(2, kv_heads=1)), Residual(SwiGLU(12)))
MAMBA = Sequence(Residual(Mamba2(state=4, head_size=4)), Residual(SwiGLU(12)))
SPARSE = Sequence(Residual(Attention(2)), Residual(MoE(3, 8)))


def module(unit, bias=1.0, scan=False):
    """A large bias of the halting unit halts every token after its first step."""
    config = Recur(unit, N, Coordinates(), ACT(bias=bias), scan)
    return cast(jittered(config.build(nnx.Rngs(0), Place(D, 0, config.branches))), jnp.float64)


def stream(rows=B, length=T, seed=3):
    return jax.random.normal(jax.random.key(seed), (rows, length, D), jnp.float64)


class Count(LayerConfig):
    """Counts how often its layer is computed."""

    layer: LayerConfig

    def build(self, rngs, at):
        return CountModule(self.layer.build(rngs, at))


class CountModule(Layer):
    calls = 0

    def __init__(self, layer):
        self.layer = layer

    def init_state(self, *args):
        return self.layer.init_state(*args)

    def __call__(self, x, tokens, state=None):
        def called():
            CountModule.calls += 1

        jax.debug.callback(called)
        return self.layer(x, tokens, state)


ON, OFF = 20.0, -20.0  # biases: to halt at once, and never


@pytest.mark.parametrize("bias, training, stateful, scan, calls", [
    (ON, None, False, False, 1), (ON, None, True, False, 1), (ON, None, True, True, 1), (OFF, None, True, True, N),
    (ON, Training(jax.random.key(0), jnp.int32(0)), False, False, N)])
def test_steps_are_computed_while_a_token_runs(float64, bias, training, stateful, scan, calls):
    made = module(Count(MAMBA), bias, scan)
    tokens = tokens_of(np.ones((B, T)), training)
    CountModule.calls = 0
    jax.block_until_ready(jax.jit(lambda m, s: m(stream(), tokens, s))(
        made, made.init_state(B, T, jnp.float64) if stateful else None)[0])
    jax.effects_barrier()
    assert CountModule.calls == calls


def test_only_keys_and_values_are_projected(float64):
    """In a step that is passed over: exactly the two products that make them, of a block that would cost far more."""
    block = Sequence(Residual(Attention(2, kv_heads=1, positions=None)), Residual(SwiGLU(12)))
    made, tokens = module(block), tokens_of(np.ones((B, T)))
    run = lambda m, state: m(stream(), tokens, state)
    cost = {kind: count(run, made, made.init_state(B, T, jnp.float64), cond=kind).matmul for kind in (min, max)}
    halting = 2 * B * T * D * N
    keys_and_values = 2 * 2 * B * T * D * (D // 2)
    per_step = (cost[max] - halting) / N
    assert cost[min] == N * keys_and_values and per_step > 5 * keys_and_values
    assert count(run, made, None, cond=min).matmul == 0  # nobody to come will read keys
    made = module(MAMBA)
    assert count(run, made, made.init_state(B, T, jnp.float64), cond=min).matmul == 0


@pytest.mark.parametrize("unit, scan", [(BLOCK, False), (SPARSE, True), (MAMBA, True), (MAMBA, False)],
                         ids=["attention", "experts-scan", "mamba2-scan", "mamba2"])
def test_nothing_comes_out_different(float64, unit, scan):
    """A text whose tokens halt early, alone (so that steps are passed over) and beside one that runs to the end."""
    made = module(unit, 0.0, scan)
    made.halting.halt[...] = jnp.zeros((D, 1)).at[0, 0].set(1.0)  # channel 0 decides
    early, late = stream(1).at[:, :, 0].set(9), stream(1, seed=4).at[:, :, 0].set(-3)
    both = jnp.concatenate([early, late])
    run = jax.jit(lambda x, state, tokens=None: made(x, tokens or tokens_of(np.ones(x.shape[:2])), state))
    alone, kept, aux = run(early, made.init_state(1, T + 1, jnp.float64))
    assert (aux.traces["halting/steps"] == 1).all()
    beside, kept_beside, aux = run(both, made.init_state(2, T + 1, jnp.float64))
    assert (aux.traces["halting/steps"][1] > 1).all()
    np.testing.assert_allclose(alone, beside[:1], rtol=1e-12)
    kept_beside = jax.tree.map(lambda a: a[:, :1] if scan else a[:1], kept_beside)
    chex.assert_trees_all_close(kept, kept_beside, rtol=1e-12)
    # A later token that runs on reads what the others left at steps that they did not take.
    one = dataclasses.replace(tokens_of([[1]]), positions=jnp.array([[T]]))
    after = run(late[:, :1], kept, one)[0]
    whole = run(jnp.concatenate([early, late[:, :1]], 1), None)[0]
    np.testing.assert_allclose(after, whole[:, -1:], rtol=1e-9)
    # And the training form, which passes no step over.
    trained = run(early, None, tokens_of(np.ones((1, T)), Training(jax.random.key(0), jnp.int32(0))))[0]
    np.testing.assert_allclose(trained, alone, rtol=1e-9)


class Echo(LayerConfig):
    """Adds what it published at the step before, 1 at first."""

    def build(self, rngs, at):
        return EchoModule()


class EchoModule(Layer):
    def __call__(self, x, tokens, state=None):
        return x + tokens.provided.get("memory", 1), None, Aux()


@pytest.mark.parametrize("scan", [False, True])
def test_published_values_of_those_who_run_on(float64, scan):
    """Tokens that halt are left out, and the others close up: what is published still finds its own token."""
    config = Recur(Provide("memory", Echo()), N, None, ACT(), scan)
    made = cast(config.build(nnx.Rngs(0), Place(D, 0, 0)), jnp.float64)
    made.halting.halt[...] = jnp.zeros((D, 1)).at[0, 0].set(1.0)
    x = stream().at[:, :, 0].set(jnp.where(jnp.arange(T) % 2, 9.0, -30.0))  # every other token halts at once
    y, _, aux = made(x, tokens_of(np.ones((B, T))))
    odd = np.arange(T) % 2 == 1
    steps = np.asarray(aux.traces["halting/steps"])
    assert (steps[:, odd] == 1).all() and (steps[:, ~odd] == N).all()
    np.testing.assert_allclose(y[:, odd], x[:, odd] + 1)
    stream_, memory, mixed = np.asarray(x), 1, 0
    for _ in range(N):
        p = 1 / (1 + np.exp(-stream_[:, :, :1] - 1))
        stream_ = memory = stream_ + memory
        mixed = p * stream_ + (1 - p) * mixed
    np.testing.assert_allclose(y[:, ~odd], mixed[:, ~odd], rtol=1e-9, atol=1e-12)
