"""Encoders and decoders: the memory, what each document may read of it, training and generation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import archlab
from archlab.attention.cross import CrossAttention
from archlab.data.batches import Batch
from archlab.encoder_decoder import EncoderDecoder
from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Memory, Place, Tokens
from archlab.training.objectives import objective, prepare
from archlab.training.step import create_state, make_train_step
from tests.helpers import cast, jittered, tokens_of

D = 16


@pytest.mark.parametrize("config", [
    CrossAttention(4), CrossAttention(4, kv_heads=2, head_size=6, bias=True, out_bias=True, scale=1.0)])
def test_cross_attention_is_the_papers(float64, config):
    """Each token: a softmax over all the memory of its own document; a token whose document has none reads nothing."""
    module = cast(jittered(config.build(nnx.Rngs(0), Place(D))), jnp.float64)
    rng = np.random.default_rng(0)
    x, values = rng.normal(size=(2, 7, D)), rng.normal(size=(2, 9, D))
    segments, read = np.array([[1] * 3 + [2] * 4, [1] * 5 + [3] * 2]), np.array([[1] * 5 + [2] * 4, [1] * 7 + [0] * 2])
    w = {path: np.asarray(p[...]) for path, p in parameters_of(module).items()}
    H, K = w["query"].shape[1:]
    want = np.zeros_like(x)
    for b, t, h in np.ndindex(2, 7, H):
        g = h // (H // w["key"].shape[1])
        head = lambda name, vector, i: vector @ w[name][:, i] + (w[f"{name}_bias"][i] if config.bias else 0)
        seen = values[b, read[b] == segments[b, t]]
        if len(seen):
            score = np.exp(head("key", seen, g) @ head("query", x[b, t], h) * (config.scale or K**-0.5))
            want[b, t] += (score / score.sum()) @ head("value", seen, g) @ w["out"][h]
    want += w.get("out_bias", 0)
    memory = Memory(jnp.asarray(values), jnp.asarray(read))
    plain = tokens_of(jnp.asarray(segments))
    tokens = Tokens(plain.segments, plain.positions, memory=memory)
    np.testing.assert_allclose(module(jnp.asarray(x), tokens)[0], want, rtol=1e-9, atol=1e-12)
    state = module.init_state(2, 7, jnp.float64, memory)
    np.testing.assert_allclose(module(jnp.asarray(x), plain, state)[0], want, rtol=1e-9, atol=1e-12)


def test_a_missing_memory_is_told():
    module = CrossAttention(2).build(nnx.Rngs(0), Place(D))
    with pytest.raises(ValueError, match="memory"):
        module.init_state(1, 4)
    with pytest.raises(ValueError, match="memory"):
        module(jnp.ones((1, 4, D)), tokens_of(jnp.ones((1, 4))))


def test_the_start_is_a_token():
    with pytest.raises(ValueError, match="start = 256"):
        archlab.get_config("t5-nano", start=256)


def test_generation_reads_the_prompt_and_writes_anew():
    """The greedy text is what whole passes give; padding of the source changes nothing."""
    model = jittered(archlab.create_model("t5-nano", nnx.Rngs(3)), size=0.3)
    source = jax.random.randint(jax.random.key(0), (2, 9), 0, 256)
    text = archlab.generate(model, source, 8, temperature=0)
    assert text.shape == (2, 8)
    memory, _ = model.encode(source)
    ids = model.begin(2)
    for _ in range(8):
        ids = jnp.concatenate([ids, model(ids, memory=memory).logits[:, -1:].argmax(-1)], 1)
    np.testing.assert_array_equal(text, ids[:, 1:])
    padded, segments = jnp.pad(source, ((0, 0), (3, 2))), jnp.pad(jnp.ones_like(source), ((0, 0), (3, 2)))
    np.testing.assert_array_equal(archlab.generate(model, padded, 8, temperature=0, segment_ids=segments), text)


def batch_of(rows=4, length=32):
    ids = np.random.default_rng(0).integers(0, 250, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[0, 20:] = 0
    return Batch(ids[:, :-1], ids[:, 1:], segments, (segments > 0).astype(np.float32))


@pytest.mark.parametrize("name, kind", [
    ("transformer-nano", "next token"), ("bert-nano", "masked tokens"), ("t5-nano", "second half")])
def test_objectives(name, kind):
    config, batch = archlab.get_config(name), batch_of()
    assert objective(config) == kind
    got = prepare(config, batch, jax.random.key(0))
    if kind == "next token":
        assert got is batch
    if kind == "second half":
        assert isinstance(config, EncoderDecoder)
        np.testing.assert_array_equal(got.source, batch.ids[:, :16])
        np.testing.assert_array_equal(got.targets, batch.targets[:, 16:])
    if kind == "masked tokens":
        hidden = np.asarray(got.weights) > 0
        assert 0.05 < hidden.mean() < 0.3 and not hidden[batch.segments == 0].any()
        np.testing.assert_array_equal(got.targets, batch.ids)
        np.testing.assert_array_equal(np.asarray(got.ids)[~hidden], batch.ids[~hidden])
        assert 0.5 < (np.asarray(got.ids)[hidden] == config.vocab - 1).mean() < 1


@pytest.mark.parametrize("name", ["bert-nano", "t5-nano"])
def test_they_learn(name):
    """A batch is learned by heart, in micro-batches too: the objective reaches the weights."""
    config, transform = archlab.get_config(name), optax.adam(1e-2)
    structure, state, _ = create_state(config, transform, seed=0)
    step = make_train_step(structure, transform, np.ones(256, np.int32), accumulate=2)
    ids = np.tile(np.arange(33, dtype=np.int32) * 7 % 200, (4, 1))
    batch = Batch(ids[:, :-1], ids[:, 1:], np.ones((4, 32), np.int32), np.ones((4, 32), np.float32))
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
