"""Multi-head latent attention against a slow float64 loop written from the paper, the laws of the contract on a small
model, and what it remembers against the published numbers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import archlab
from archlab.attention.attention import Attention
from archlab.attention.latent import LatentAttention
from archlab.attention.positions import ALiBi, Rotary
from archlab.attention.scaling import YaRN
from archlab.layers.alphabet import parameters_of
from archlab.layers.config import from_json
from archlab.layers.contract import Place
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from tests.helpers import build, cast, in_pieces, jittered, tokens_of

D, T = 16, 20
SEGMENTS = np.array([[1] * 5 + [2] * 9 + [3] * 6, [4] * 17 + [0] * 3])
SMALL = dict(rank=6, content_size=4, rotary_size=6, value_size=5)
YARN = YaRN(40.0, 8, mscale=1.0, mscale_all_dim=0.707)
LAWS = pytest.mark.xdist_group("latent attention")
V3 = LatentAttention(128, query_rank=1536, positions=Rotary(
    interleaved=True, scaling=YaRN(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)))


def reference(config: LatentAttention, w, x, segments, positions):
    """Appendix C of arXiv:2405.04434, with the norms of its section 3.1.2, one query and one head at a time."""
    y = np.zeros_like(x)
    half = config.rotary_size // 2

    def norm(vector, name):
        return vector / np.sqrt((vector**2).mean() + config.norm.eps) * w[f"{name}_norm/scale"]

    def turn(vector, position):
        if config.positions is None:
            return vector
        frequencies, factor = config.positions.base ** (-np.arange(half) / half), 1.0
        if config.positions.scaling is not None:
            frequencies, factor = config.positions.scaling.frequencies(config.positions.base, 2 * half, None)
        if config.positions.interleaved:
            vector = np.concatenate([vector[0::2], vector[1::2]])  # of queries and keys alike: no score changes
        pairs = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * frequencies) * factor
        return np.concatenate([pairs.real, pairs.imag])

    @functools.cache
    def query(b, t, h):
        if config.query_rank is None:
            q = x[b, t] @ w["query"][:, h]
        else:
            q = norm(x[b, t] @ w["query_down"] + w.get("query_down_bias", 0), "query") @ w["query_up"][:, h]
        return np.concatenate([q[: config.content_size], turn(q[config.content_size :], positions[b, t])])

    @functools.cache
    def latent(b, s):
        return norm(x[b, s] @ w["latent"] + w.get("latent_bias", 0), "latent")

    @functools.cache
    def key(b, s, h):
        shared = turn(x[b, s] @ w["shared_key"] + w.get("shared_key_bias", 0), positions[b, s])
        return np.concatenate([latent(b, s) @ w["key_up"][:, h], shared])

    scale = config.scale or (config.content_size + config.rotary_size) ** -0.5
    if config.positions is not None and config.positions.scaling is not None:
        scale *= (0.1 * config.positions.scaling.mscale_all_dim * math.log(config.positions.scaling.factor) + 1) ** 2
    for b, t, h in np.ndindex(*segments.shape, config.heads):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] != 0]
        if seen:
            scores = np.exp([query(b, t, h) @ key(b, s, h) * scale for s in seen])
            values = np.stack([latent(b, s) @ w["value_up"][:, h] for s in seen])
            y[b, t] += scores / scores.sum() @ values @ w["out"][h]
    return y + w.get("out_bias", 0)


@pytest.mark.parametrize("config", [
    LatentAttention(2, **SMALL),
    LatentAttention(3, query_rank=7, bias=True, norm=RMSNorm(0.1), **SMALL),
    LatentAttention(2, query_rank=5, positions=Rotary(100.0, interleaved=False, scaling=YARN), **SMALL),
    LatentAttention(1, positions=None, scale=0.7, **SMALL),
], ids=["plain", "biases", "yarn", "no positions"])
def test_latent_attention_is_the_papers(float64, config):
    """Without a state (expanded) and with one (absorbed), over packed documents and padding."""
    module = cast(jax.jit(lambda: jittered(config.build(nnx.Rngs(0), Place(D))))(), jnp.float64)
    run = jax.jit(lambda x, tokens, state: module(x, tokens, state))
    x = np.random.default_rng(0).normal(size=(2, T, D))
    tokens = tokens_of(SEGMENTS)
    w = {path: np.asarray(p[...]) for path, p in parameters_of(module).items()}
    real = SEGMENTS > 0
    want = reference(config, w, x, SEGMENTS, np.asarray(tokens.positions))[real]
    np.testing.assert_allclose(np.asarray(run(x, tokens, None)[0])[real], want, rtol=1e-9, atol=1e-12)
    y = in_pieces(run, module.init_state(2, T, jnp.float64), x, tokens, (7, 1, 12))
    np.testing.assert_allclose(np.asarray(y)[real], want, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def model():  # the laws are held in one process, which makes it and compiles its programs once
    block = Sequence(Residual(LatentAttention(2, query_rank=8, **SMALL)), Residual(SwiGLU(24)))
    with jax.enable_x64(True):
        return cast(build(LanguageModel(64, D, Repeat(block, 2))), jnp.float64)


def ids_of():
    return jnp.asarray(np.random.default_rng(1).integers(0, 64, (2, T)))


@jax.jit
def run(model, ids, state=None, segments=None):
    return model(ids, state, segment_ids=segments)[:2]


def pieces(model, ids, cuts, segments=None):
    state, outs, at = model.init_state(ids.shape[0], ids.shape[1]), [], 0
    for width in cuts:
        part = slice(at, at + width)
        logits, state = run(model, ids[:, part], state, None if segments is None else segments[:, part])
        outs.append(logits)
        at += width
    return np.concatenate(outs, 1)


@LAWS
@pytest.mark.parametrize("cuts", [(T,), (5, 1, 1, 9, 4), (1,) * T], ids=["whole", "mixed", "single"])
def test_any_split_equals_one_pass(float64, model, cuts):
    np.testing.assert_allclose(pieces(model, ids_of(), cuts), run(model, ids_of())[0], rtol=1e-9, atol=1e-9)


@LAWS
def test_causal(float64, model):
    ids, at = ids_of(), 13
    other = ids.at[:, at:].set((ids[:, at:] + 7) % 64)
    before, after = run(model, ids)[0], run(model, other)[0]
    np.testing.assert_allclose(after[:, :at], before[:, :at], rtol=1e-9, atol=1e-9)
    assert not np.allclose(after[:, at:], before[:, at:])


@LAWS
def test_packed_documents_and_padding(float64, model):
    """Documents are alone, and padding between and after them changes nothing, with and without a state."""
    segments = jnp.tile(jnp.array([1] * 6 + [0] * 2 + [2] * 9 + [0] * 3), (2, 1))
    packed = run(model, ids_of(), segments=segments)[0]
    continued = pieces(model, ids_of(), (9, 1, 10), segments)
    for part in (slice(0, 6), slice(8, 17)):
        alone = run(model, ids_of()[:, part])[0]
        np.testing.assert_allclose(packed[:, part], alone, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(continued[:, part], alone, rtol=1e-9, atol=1e-9)


def test_long_pieces_continue_from_a_state():
    """Pieces longer than a block of queries: the first into an empty cache (expanded), the last behind it (absorbed);
    neither keeps a rectangle of scores."""
    length, heads = 300, 2
    module = jax.jit(lambda: jittered(LatentAttention(heads, **SMALL).build(nnx.Rngs(0), Place(D))))()
    x = jax.random.normal(jax.random.key(0), (2, length, D))
    tokens = tokens_of(jnp.stack([jnp.arange(length) // 120 + 1, jnp.where(jnp.arange(length) < 280, 1, 0)]))
    run = jax.jit(lambda x, tokens, state: module(x, tokens, state))
    want = run(x, tokens, None)[0]
    got = in_pieces(run, module.init_state(2, length), x, tokens, (140, 1, 159))
    np.testing.assert_allclose(jnp.where(tokens.real[..., None], got - want, 0), 0, atol=2e-5)

    length = 2048
    lowered = run.lower(jnp.ones((1, length, D)), tokens_of(jnp.ones((1, length))), module.init_state(1, length + 64))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < heads * length**2


def test_the_cache_is_the_published_one():
    """V2 and V3 remember (512 + 64) numbers a token and layer (arXiv:2405.04434, table 1: 9/2 of 128); V3 in bfloat16
    70,272 bytes over its 61 layers (arXiv:2505.09343, table 1). Places and segments are 8 bytes more a layer."""
    def bytes_per_token(config, width, dtype):
        module = nnx.eval_shape(lambda: config.build(nnx.Rngs(0), Place(width)))
        leaves = lambda slots: jax.tree.leaves(jax.eval_shape(lambda: module.init_state(1, slots, dtype)))
        grown = [(a.size - b.size) * a.dtype.itemsize for a, b in zip(leaves(9), leaves(8))]
        floats = [jnp.issubdtype(a.dtype, jnp.floating) for a in leaves(1)]
        return sum(n for n, f in zip(grown, floats) if f), sum(n for n, f in zip(grown, floats) if not f)

    assert bytes_per_token(V3, 7168, jnp.bfloat16) == (576 * 2, 8)
    assert 61 * bytes_per_token(V3, 7168, jnp.bfloat16)[0] == 70272
    assert bytes_per_token(Attention(128, head_size=128), 7168, jnp.bfloat16)[0] == 2 * 128 * 128 * 2


def test_no_heads_over_the_cache():
    """A decode step needs memory for scores and one copy of the cache, not for keys or values of every head."""
    slots, heads, size = 2048, 16, 32
    config = LatentAttention(heads, rank=16, content_size=size, rotary_size=16, value_size=size)
    module = jax.jit(lambda: config.build(nnx.Rngs(0), Place(D)))()
    step = jax.jit(lambda x, state: module(x, tokens_of(jnp.ones((1, 1))), state)[:2], donate_argnums=1)
    compiled = step.lower(jnp.ones((1, 1, D)), module.init_state(1, slots)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * slots * heads * size / 4


def test_published_sizes():
    """The weights of DeepSeek-V3's attention (arXiv:2412.19437, section 4.2): 187,107,328 a layer."""
    module = nnx.eval_shape(lambda: V3.build(nnx.Rngs(0), Place(7168)))
    sizes = {path: p.size for path, p in parameters_of(module).items()}
    assert sum(sizes.values()) == 187_107_328
    assert sizes["latent"] + sizes["shared_key"] == 7168 * 576
    np.testing.assert_allclose(V3.rules.scale, 192**-0.5 * (0.1 * math.log(40) + 1) ** 2)


def test_accounts():
    block = Sequence(Residual(LatentAttention(2, **SMALL)), Residual(SwiGLU(24)))
    config = LanguageModel(64, D, Repeat(block, 3))
    told = archlab.profile(config, context=512)
    # per layer and slot: 12 floats, a place and a segment; a cursor a layer; and three numbers of the model's own
    assert told.state_bytes == 3 * (512 * (12 * 4 + 8) + 4) + 12
    assert from_json(config.to_json()) == config
    assert config.body.causal and not config.body.recurrent and config.body.longest is None
    # absorbed: of each slot and head 6 + 6 for scores and 12 for values; three layers
    assert told.decode.matmul - archlab.profile(config, context=256).decode.matmul == 3 * 2 * 2 * 256 * (12 + 12)


@pytest.mark.parametrize("fields, told", [
    ({"heads": 0}, "heads = 0"), ({"rank": 0}, "rank = 0"), ({"query_rank": 0}, "query_rank = 0"),
    ({"rotary_size": 63}, "rotary_size = 63"), ({"content_size": 0}, "content_size = 0"),
    ({"value_size": -1}, "value_size = -1"), ({"positions": ALiBi()}, "positions = ALiBi"),
    ({"positions": Rotary(size=128)}, "size = 128"), ({"norm": None}, "norm = None"), ({"scale": 0.0}, "scale = 0.0"),
])
def test_bad_fields_are_named(fields, told):
    with pytest.raises(ValueError, match=told):
        LatentAttention(**{"heads": 2, **fields})


def test_a_piece_too_long_for_the_state():
    def run():
        module = LatentAttention(2, **SMALL).build(nnx.Rngs(0), Place(D))
        module(jnp.ones((2, T, D)), tokens_of(SEGMENTS), module.init_state(2, 8))

    with pytest.raises(ValueError, match="a piece of 20 tokens does not fit a state of max_length 8"):
        jax.eval_shape(run)
