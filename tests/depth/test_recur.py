"""Recurrence in depth and adaptive computation time, against loops written from the papers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.attention.attention import Attention
from archlab.depth.coordinates import Coordinates
from archlab.depth.halting import ACT
from archlab.depth.recur import Recur
from archlab.depth.own import LowRank, Own
from archlab.experts.moe import MoE
from archlab.layers.alphabet import parameters_of
from archlab.layers.config import LayerConfig
from archlab.layers.contract import Aux, Layer, Place, Training
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Identity, Parallel, Provide, Sequence
from archlab.recurrence.mamba import Mamba
from archlab.recurrence.mamba2 import Mamba2
from archlab.recurrence.min_gru import MinGRU
from tests.helpers import in_pieces, cast, jittered, tokens_of

B, T, D = 2, 17, 8
BLOCK = Sequence(Residual(Attention(2), dropout=0.3), Residual(SwiGLU(12)))


def module(config, seed=0):
    return cast(jittered(config.build(nnx.Rngs(seed), Place(D, 0, config.branches)), seed + 1), jnp.float64)


def stream(seed=3, length=T):
    return jax.random.normal(jax.random.key(seed), (B, length, D), jnp.float64)


def undecided(config, size=2.0):
    """The module with a halting unit that disagrees about tokens."""
    made = module(config)
    made.halting.halt[...] = size * made.halting.halt[...] / np.abs(np.asarray(made.halting.halt[...])).max()
    made.halting.bias[...] = made.halting.bias[...] - 1.5
    return made


def reference(made, config, x, tokens):
    """Per token: Graves' halting (2016, eq. 5-8) and mean (eq. 9) or the Universal Transformer's running interpolation,
    and its signal."""
    running = config.halting.mixture == "running"
    w, b = np.asarray(made.halting.halt[...])[:, 0], float(made.halting.bias[...][0])
    unit = jax.jit(lambda x: made.unit(x, tokens)[0])
    h, real, positions = np.array(x), np.asarray(tokens.real), np.asarray(tokens.positions)
    s, total, left = np.zeros_like(h), np.zeros((B, T)), np.zeros((B, T))
    steps, halted = np.zeros((B, T), int), np.zeros((B, T), bool)
    for step in range(1, config.n + 1):
        before = h.copy()
        for row, t, j in np.ndindex(B, T, D // 2):
            for wave, at in ((np.sin, 2 * j), (np.cos, 2 * j + 1)):
                rate = 10000 ** (2 * j / D)
                before[row, t, at] += (wave(positions[row, t] / rate) + wave(step / rate)) / np.sqrt(D)
        after = np.asarray(unit(jnp.asarray(before)))
        for row, t in zip(*np.nonzero(real & ~halted)):
            p = 1 / (1 + np.exp(-(before[row, t] @ w + b)))
            steps[row, t] += 1
            if total[row, t] + p > 1 - config.halting.epsilon:
                halted[row, t], left[row, t] = True, 1 - total[row, t]
                u = left[row, t]
            else:
                total[row, t] += p
                u = p
            s[row, t] = u * after[row, t] + (1 - u if running else 1) * s[row, t]
            h[row, t] = after[row, t]
    return s, steps, (steps + left)[real].mean()


@pytest.mark.parametrize("scan, mixture", [(False, "running"), (True, "running"), (True, "accumulated")])
def test_act_against_loop(float64, scan, mixture):
    config = Recur(BLOCK, 5, Coordinates(), ACT(ponder=0.25, epsilon=0.05, mixture=mixture), scan=scan)
    made, x = undecided(config), stream()
    tokens = tokens_of([[1] * 9 + [2] * 8, [1] * 13 + [0] * 4])
    y, _, aux = jax.jit(lambda x: made(x, tokens))(x)
    s, steps, ponder = reference(made, config, x, tokens)
    real = np.asarray(tokens.real)
    np.testing.assert_allclose(np.asarray(y)[real], s[real], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(aux.traces["halting/steps"], steps)
    assert len(set(steps[real])) >= 4 and (steps[~real] == 0).all()  # the test would be empty otherwise
    np.testing.assert_allclose(aux.traces["halting/ponder"], ponder, rtol=1e-9)
    np.testing.assert_allclose(aux.losses["halting/ponder"], 0.25 * ponder, rtol=1e-9)


def test_recurrent_units_skip_halted_tokens(float64):
    """At each step the unit runs, in the loop, over a text of the running tokens and no others."""
    T = 9
    made, x = undecided(Recur(Residual(MinGRU()), 4, None, ACT(mixture="accumulated"), scan=False)), stream(length=T)
    run = jax.jit(lambda x, tokens: made(x, tokens))
    y, _, aux = run(x, tokens_of(np.ones((B, T))))
    trained = run(x, tokens_of(np.ones((B, T)), Training(jax.random.key(0), jnp.int32(0))))[0]
    unit = jax.jit(lambda x, tokens: made.unit(x, tokens)[0])
    w, b = np.asarray(made.halting.halt[...])[:, 0], float(made.halting.bias[...][0])
    mixed, steps = np.zeros((B, T, D)), np.zeros((B, T), int)
    for row in range(B):
        h, total, running = np.array(x[row]), np.zeros(T), np.arange(T)
        for _ in range(4):
            if not len(running):
                break
            p = 1 / (1 + np.exp(-(h[running] @ w + b)))
            short = np.asarray(unit(jnp.asarray(h[None, running]), tokens_of(np.ones((1, len(running)))))[0])
            halts = total[running] + p > 0.99
            u = np.where(halts, 1 - total[running], p)
            h[running] = short
            mixed[row, running] += u[:, None] * short
            steps[row, running] += 1
            total[running] += p
            running = running[~halts]
    np.testing.assert_array_equal(aux.traces["halting/steps"], steps)
    assert len(np.unique(steps)) >= 3
    for form in (y, trained):
        np.testing.assert_allclose(form, mixed, rtol=1e-9, atol=1e-9)


def test_offset_of_places(float64):
    """In the training form a row's places begin anywhere up to `offset`, the same at all steps; otherwise at 0."""
    signal, x = Coordinates(offset=5), jnp.zeros((40, 3, D))
    train = tokens_of(np.ones((40, 3)), Training(jax.random.key(0), jnp.int32(0)))
    shifted = [Coordinates().signal(x, dataclasses.replace(train, positions=train.positions + by), 1)
               for by in range(6)]
    drawn = signal.signal(x, train, 1)
    by = [next(k for k in range(6) if np.allclose(drawn[row], shifted[k][row], atol=1e-12)) for row in range(40)]
    assert set(by) == set(range(6))
    np.testing.assert_allclose(signal.signal(x, train, 2) - drawn,
                               Coordinates().signal(x, train, 2) - Coordinates().signal(x, train, 1), atol=1e-12)
    plain = tokens_of(np.ones((40, 3)))
    np.testing.assert_array_equal(signal.signal(x, plain, 1), Coordinates().signal(x, plain, 1))


def test_ponder_loss_teaches_to_halt(float64):
    """Its gradient comes from the remainder alone: the bias should rise, so that halting comes sooner."""
    made = undecided(Recur(Residual(SwiGLU(12)), 4, None, ACT(), scan=False))
    tokens = tokens_of(np.ones((B, T)))
    gradient = jax.grad(lambda m: m(stream(), tokens)[2].loss())(made)
    assert gradient.halting.bias[...][0] < 0


MAMBA2 = Sequence(Residual(LowRank(Mamba2(state=4, head_size=4), 2)), Residual(MoE(3, 8), Own(RMSNorm())))
HYBRID = Repeat(Parallel(Residual(Attention(2, window=5)), Residual(MinGRU())), 2)


@pytest.mark.parametrize("unit, scan", [(BLOCK, False), (Residual(Mamba(state=4)), True), (MAMBA2, True),
                                        (HYBRID, True)], ids=["attention", "mamba", "mamba2-experts", "hybrid"])
def test_splits_packing_and_padding(float64, unit, scan):
    """With halting, where tokens stop at different steps: nothing depends on how a text is cut or packed."""
    made, x = undecided(Recur(unit, 4, Coordinates(), ACT(), scan=scan)), stream(length=30)
    segments = np.repeat([[1, 2]], [17, 13], axis=1).repeat(B, 0)
    segments[1, 26:] = 0
    run = jax.jit(lambda x, tokens, state: made(x, tokens, state))
    whole, _, aux = run(x, tokens_of(segments), None)
    assert len(np.unique(aux.traces["halting/steps"])) >= 4
    real = segments > 0
    for cuts in ((14, 1, 1, 14), (1,) * 30):
        through = in_pieces(run, made.init_state(B, 30, jnp.float64), x, tokens_of(segments), cuts)
        np.testing.assert_allclose(through[real], whole[real], rtol=1e-9, atol=1e-9)
    alone, _, _ = run(x[:, 17:26], tokens_of(np.ones((B, 9))), None)
    np.testing.assert_allclose(whole[:, 17:26], alone, rtol=1e-9, atol=1e-9)


def test_scanned_equals_unrolled_in_training(float64):
    """Dropout draws the same masks in both forms, and other ones at each step."""
    tokens = tokens_of(np.ones((B, T)), Training(jax.random.key(5), jnp.int32(0)))
    outs = []
    for scan in (False, True):
        made = module(Recur(BLOCK, 3, Coordinates(), ACT(), scan=scan))

        def loss(made):
            y, _, aux = made(stream(), tokens)
            return (y**2).sum() + aux.loss(), aux

        outs.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(made))
    chex.assert_trees_all_close(jax.tree.leaves(outs[0]), jax.tree.leaves(outs[1]), rtol=1e-8, atol=1e-10)
    dropped = module(Recur(Residual(Identity(), before=None, dropout=0.5), 2, scan=False))
    y = dropped(jnp.ones((B, T, D)), tokens)[0]
    assert set(np.unique(y)) == {1, 3, 9}  # kept at neither, one or both steps: masks of steps differ


class Remember(LayerConfig):
    """Adds what the step before published, and counts its calls in an update."""

    def build(self, rngs, at):
        return RememberModule()


class RememberModule(Layer):
    def __call__(self, x, tokens, state=None):
        return 2 * x + tokens.provided.get("memory", 1), None, Aux(updates={"calls": jnp.ones(3)})


@pytest.mark.parametrize("scan", [False, True])
def test_published_values_last_over_the_steps(float64, scan):
    config = Recur(Provide("memory", Remember()), 4, scan=scan)
    made, x = module(config), stream()
    y, _, aux = made(x, tokens_of(np.ones((B, T))))
    expected, memory = np.asarray(x), 1
    for _ in range(4):
        expected = memory = 2 * expected + memory
    np.testing.assert_allclose(y, expected)
    assert aux.provides == {}
    np.testing.assert_array_equal(aux.updates["unit/layer/calls"], np.full(3, 4.0))


def test_depth_accounting():
    config = Recur(BLOCK, 6)
    assert config.branches == 12 and config.causal and not config.recurrent
    assert Recur(Residual(Mamba()), 6).recurrent
    made = nnx.eval_shape(lambda: Recur(BLOCK, 6, None, ACT()).build(nnx.Rngs(0), Place(D, 0, 12)))
    assert {p.uses for p in parameters_of(made).values()} == {6}


@pytest.mark.parametrize("make, words", [
    (lambda: Recur(BLOCK, 0), "Recur.n = 0: must be at least 1"),
    (lambda: ACT(epsilon=0.0), "ACT.epsilon = 0.0: must lie between 0 and 1"),
    (lambda: ACT(mixture="mean"), "ACT.mixture = 'mean': there are running, accumulated"),
    (lambda: ACT(epsilon=1.5), "ACT.epsilon = 1.5: must lie between 0 and 1"),
    (lambda: ACT(ponder=-1.0), "ACT.ponder = -1.0: must be 0"),
    (lambda: Coordinates(offset=-1), "Coordinates.offset = -1: must be 0"),
    (lambda: Coordinates(base=1.0), "Coordinates.base = 1.0: must be above 1"),
    (lambda: Recur(Residual(SwiGLU(4)), 2, Coordinates()).check(7), "the width 7 must be even"),
    (lambda: Recur(BLOCK, 2).check(9), "Attention.heads = 2: must divide the width 9"),
])
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
