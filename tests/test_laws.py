"""The laws of the contract, over every small model of the zoo: a new family is held to them the day it is added.

All of it in float64: discrete routing and halting then cannot flip on round-off, and a difference is a difference.
docs/contract.md states the laws and lists who is exempt from which, with the reason.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archlab
from archlab.encoder_decoder import EncoderDecoder
from archlab.layers.config import from_json
from archlab.layers.contract import Training
from experiments.common import model_config
from tests.helpers import build, cast, tokens_of, with_scan

NANO = archlab.list_models("*-nano")
B, T = 2, 22
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


def pytest_generate_tests(metafunc):
    """Every law for every small model of the zoo, or for the file that `--model` names."""
    own = metafunc.config.getoption("--model")
    # One process for all laws of a model: they share its compiled programs.
    names = [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in ([own] if own else NANO)]
    metafunc.parametrize("name", names)


@functools.cache
def config_of(name):
    return model_config(name, [])


@functools.cache
def model_of(name):
    with jax.enable_x64(True):
        return cast(build(config_of(name)), jnp.float64)


def memory_of(model, source, segments=None):
    """What an encoder-decoder reads: the source bears the decoder's segment numbers. None for other models."""
    return model.encode(source, segments)[0] if isinstance(model.config, EncoderDecoder) else None


@functools.cache
def run_of(name):
    def run(model, ids, state, segments, source):
        memory = memory_of(model, source, segments) if state is None else None
        return model(ids, state, segment_ids=segments, memory=memory)

    return jax.jit(run)


def run(name, ids, state=None, segments=None, source=None):
    """A pass; an encoder-decoder reads the ids themselves, or another `source`."""
    return run_of(name)(model_of(name), ids, state, segments, ids if source is None else source)


def both_ways(name):
    if not config_of(name).body.causal:
        pytest.skip("sees both ways by definition")


def ids_of(length=T):
    return jnp.asarray(np.random.default_rng(1).integers(0, 256, (B, length)))


def pieces(name, ids, cuts, segments=None):
    """One piece after another through a state. Nearly all of this file's time is compilation, so that all tests cut
    into the same few widths, and always say the segments."""
    segments = jnp.ones(ids.shape, jnp.int32) if segments is None else segments
    memory = memory_of(model_of(name), ids, segments)
    state, outs, at = model_of(name).init_state(B, T, memory=memory), [], 0
    for width in cuts:
        piece = slice(at, at + width)
        out = run(name, ids[:, piece], state, segments[:, piece])
        outs.append(out.logits)
        state, at = out.state, at + width
    return jnp.concatenate(outs, 1)


def test_size(name):
    """Small enough for all of these tests; a file of one's own may be larger."""
    if name not in NANO:
        pytest.skip("not of the zoo")
    leaves = jax.tree.leaves(jax.eval_shape(lambda: archlab.create_model(name, archlab.zoo.nnx.Rngs(0))))
    assert sum(leaf.size for leaf in leaves) < 50_000


def test_config_round_trip(name):
    config = config_of(name)
    assert from_json(config.to_json()) == config


@pytest.mark.parametrize("cuts", [(T,), (6, 1, 9, 6), (1,) * T], ids=["whole", "mixed", "single"])
def test_any_split_equals_one_pass(float64, name, cuts):
    both_ways(name)
    close(pieces(name, ids_of(), cuts), run(name, ids_of()).logits)


def test_causal_by_change(float64, name):
    """Other tokens from place 13 on leave everything before it as it was."""
    both_ways(name)
    ids, at = ids_of(), 13
    other = ids.at[:, at:].set((ids[:, at:] + 7) % 256)
    before, after = run(name, ids).logits, run(name, other, source=ids).logits
    close(after[:, :at], before[:, :at])
    assert not np.allclose(after[:, at:], before[:, at:])


def test_causal_by_gradient(float64, name):
    """No output has a gradient from a later token; the last one has some from the first."""
    both_ways(name)
    tokens = dataclasses.replace(tokens_of(jnp.ones((1, 9))), memory=memory_of(model_of(name), ids_of(5)[:1]))
    body, x = model_of(name).body, jax.random.normal(jax.random.key(2), (1, 9, config_of(name).width))
    cotangent = jax.random.normal(jax.random.key(3), x.shape[-1:], jnp.float64)
    reach = jax.jit(jax.jacrev(lambda x: body(x, tokens)[0][0] @ cotangent))(x.astype(jnp.float64))
    strength = np.abs(np.asarray(reach)[:, 0]).sum(-1)  # [output, input]
    assert (np.triu(strength, 1) == 0).all()
    assert (np.diag(strength) > 0).all() and strength[-1, 0] > 0


def test_packed_documents_are_alone(float64, name):
    segments = jnp.repeat(jnp.array([[1, 2, 3]]), jnp.array([7, 4, 11]), axis=1, total_repeat_length=T)
    segments = jnp.tile(segments, (B, 1))
    packed = run(name, ids_of(), segments=segments).logits
    for part in (slice(0, 7), slice(7, 11), slice(11, T)):
        length = part.stop - part.start
        alone = jnp.roll(ids_of(), -part.start, 1), jnp.tile(jnp.arange(T) < length, (B, 1)).astype(jnp.int32)
        close(packed[:, part], run(name, alone[0], segments=alone[1]).logits[:, :length])
    close(packed[:, 11:], run(name, ids_of()[:, 11:]).logits)  # and without padding beside it
    if config_of(name).body.causal:
        close(pieces(name, ids_of(), (9, 1, 6, 6), segments), packed)


def test_padding_changes_nothing(float64, name):
    """Padding before, between and after, different in each row, with and without a state."""
    real = np.ones((B, T + 6), int)
    real[0, [0, 1, 2, 9, 15, 27]] = 0
    real[1, [4, 5, 6, 25, 26, 27]] = 0
    where = np.stack([np.flatnonzero(row) for row in real])
    ids = np.full(real.shape, 99)
    np.put_along_axis(ids, where, np.asarray(ids_of()), 1)
    alone = run(name, ids_of()).logits
    there = lambda logits: np.take_along_axis(np.asarray(logits), where[:, :, None], 1)
    segments = jnp.asarray(real)
    close(there(run(name, jnp.asarray(ids), segments=segments).logits), alone)
    if config_of(name).body.causal:
        close(there(pieces(name, jnp.asarray(ids), (6, 1, 6, 9, 6), segments)), alone)


def test_state_is_a_fixed_point(float64, name):
    model = model_of(name)
    for dtype in (jnp.float64, jnp.bfloat16):
        state = jax.eval_shape(lambda: model.init_state(B, 16, dtype, memory=memory_of(model, ids_of())))
        for length in (1, 5):
            ids = jax.ShapeDtypeStruct((B, length), jnp.int32)
            after = jax.eval_shape(lambda m, i, s: m(i, s).state, model, ids, state)
            chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_decode_cost(float64, name):
    """A step's work is free of the context in recurrent and windowed models, at most linear in it otherwise."""
    both_ways(name)
    from archlab.analysis.flops import count

    model = model_of(name)

    def step(max_length):
        state = jax.eval_shape(lambda: model.init_state(1, max_length, memory=memory_of(model, ids_of()[:1])))
        return count(lambda m, i, s: m(i, s)[:2], model, jax.ShapeDtypeStruct((1, 1), jnp.int32), state).matmul

    short, long = step(64), step(256)
    assert long == short if config_of(name).body.recurrent else long <= 4 * short


def test_gradients_are_finite(name):
    """In float32 and bfloat16, with a document of one token and with padding, in the training form."""
    segments = jnp.array([[1] * 12 + [2] * 1 + [3] * 9, [1] * 20 + [0] * 2])
    for dtype in (None, "bfloat16"):
        model = build(config_of(name).set("dtype", dtype))

        def loss(model):
            out = model(ids_of(), segment_ids=segments, training=Training(jax.random.key(0), jnp.int32(5)),
                        memory=memory_of(model, ids_of(), segments))
            return model.losses(out.hidden, ids_of()).mean() + out.aux.loss()

        value, grads = jax.jit(jax.value_and_grad(loss, allow_int=True))(model)
        assert np.isfinite(value)
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
            assert leaf.dtype == jax.dtypes.float0 or np.isfinite(leaf).all(), jax.tree_util.keystr(path)


def test_scanned_equals_unrolled(float64, name):
    """Outputs, losses and traces agree between the two ways to run copies, in the training form too."""
    config = config_of(name)
    training = Training(jax.random.key(0), jnp.int32(5))
    outs = []
    for scan in (False, True):
        twin = cast(build(with_scan(config, scan)), jnp.float64)
        outs.append(jax.jit(lambda m: m(ids_of(), training=training, memory=memory_of(m, ids_of())))(twin))
    close(outs[0].logits, outs[1].logits)
    chex.assert_trees_all_close(outs[0].aux, outs[1].aux, rtol=1e-6, atol=1e-9)
