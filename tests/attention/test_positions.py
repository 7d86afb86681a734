"""Positions of attention against slow float64 loops written from the papers, and against transformers where it is."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.attention import core
from archlab.attention.attention import Attention
from archlab.attention.positions import ALiBi, RelativePositions, Rotary, Temperature, XPos
from archlab.attention.relative import LinearBias, RelativeBias, TableBias, bucket_of
from archlab.attention.scaling import (DynamicNTK, Llama3Scaling, LinearScaling, LongRoPE, NTKScaling,
                                       ProportionalScaling, YaRN, plain_frequencies)
from archlab.layers.config import from_json
from archlab.layers.contract import Place
from archlab.layers.sequence import Sequence
from tests.helpers import cast, in_pieces, jittered, tokens_of

OF_TRANSFORMERS = pytest.mark.xdist_group("transformers")  # whose import takes seconds: once is enough
SHORT, LONG = (1.0, 1.25, 2.0, 3.5), (1.5, 4.0, 16.0, 40.0)
SCALINGS = [
    LinearScaling(4.0), NTKScaling(4.0), DynamicNTK(3.0, original=64), YaRN(8.0, original=64),
    YaRN(8.0, original=2048, mscale=1.0, mscale_all_dim=0.5), YaRN(4.0, original=64, attention_factor=1.5),
    YaRN(32.0, original=4096, beta_fast=16, beta_slow=2, truncate=False), YaRN(2.0, original=8, beta_fast=64),
    LongRoPE(SHORT, LONG, original=64, factor=4.0), LongRoPE(SHORT, LONG, 64, 4.0, attention_factor=1.25),
    Llama3Scaling(8.0, low=1.0, high=4.0, original=256), Llama3Scaling(8.0, low=1.0, high=1.0, original=256),
    ProportionalScaling(0.5), ProportionalScaling(0.25, 8.0),
]


def paper_frequencies(rule, base, d, length):
    """One pair at a time."""
    f, out, factor = [base ** (-2 * j / d) for j in range(d // 2)], [], 1.0
    for j, plain in enumerate(f):
        if isinstance(rule, LinearScaling):
            new = plain / rule.factor
        elif isinstance(rule, NTKScaling):
            new = (base * rule.factor ** (d / (d - 2))) ** (-2 * j / d)
        elif isinstance(rule, DynamicNTK):
            stretch = rule.factor * max(length, rule.original) / rule.original - (rule.factor - 1)
            new = (base * stretch ** (d / (d - 2))) ** (-2 * j / d)
        elif isinstance(rule, YaRN):
            place = lambda turns: d * math.log(rule.original / (turns * 2 * math.pi)) / (2 * math.log(base))
            low, high = place(rule.beta_fast), place(rule.beta_slow)
            if rule.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, d - 1)
            share = min(max((j - low) / (high - low), 0.0), 1.0)
            new = share * plain / rule.factor + (1 - share) * plain
            size = lambda scale: 0.1 * scale * math.log(rule.factor) + 1
            factor = size(1) if rule.mscale is None else size(rule.mscale) / size(rule.mscale_all_dim)
            factor = factor if rule.attention_factor is None else rule.attention_factor
        elif isinstance(rule, LongRoPE):
            new = plain / (rule.long if length > rule.original else rule.short)[j]
            factor = rule.attention_factor or math.sqrt(1 + math.log(rule.factor) / math.log(rule.original))
        elif isinstance(rule, Llama3Scaling):
            wave = 2 * math.pi / plain
            if wave < rule.original / rule.high:
                new = plain
            elif wave > rule.original / rule.low:
                new = plain / rule.factor
            else:
                smooth = (rule.original / wave - rule.low) / (rule.high - rule.low)
                new = (1 - smooth) * plain / rule.factor + smooth * plain
        else:
            new = plain / rule.factor if j < rule.share * d // 2 else 0.0
        out.append(new)
    return out, factor


@pytest.mark.parametrize("length", [16, 64, 65, 1000])
@pytest.mark.parametrize("rule", SCALINGS, ids=str)
def test_scalings_are_the_papers(float64, rule, length):
    want, want_factor = paper_frequencies(rule, 1000.0, 8, length)
    traced = jax.jit(lambda n: jnp.asarray(rule.frequencies(1000.0, 8, n)[0]))
    for got in (rule.frequencies(1000.0, 8, length)[0], traced(jnp.int32(length))):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    assert rule.frequencies(1000.0, 8, length)[1] == pytest.approx(want_factor, rel=1e-12)


def to_transformers(rule):
    """The rule as `rope_parameters` of a config of transformers, and its `max_position_embeddings`."""
    name = {LinearScaling: "linear", DynamicNTK: "dynamic", YaRN: "yarn", LongRoPE: "longrope",
            Llama3Scaling: "llama3", ProportionalScaling: "proportional"}[type(rule)]
    names = {"short": "short_factor", "long": "long_factor", "low": "low_freq_factor", "high": "high_freq_factor",
             "original": "original_max_position_embeddings", "share": "partial_rotary_factor"}
    fields = {names.get(f.name, f.name): getattr(rule, f.name) for f in dataclasses.fields(rule)}
    original = fields.get("original_max_position_embeddings", 64)
    if name == "dynamic":
        del fields["original_max_position_embeddings"]
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    return {"rope_type": name, "rope_theta": 1000.0} | listed, original


@OF_TRANSFORMERS
def test_scalings_are_those_of_transformers():
    reference = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    from transformers import LlamaConfig

    for rule, length in itertools.product(SCALINGS, (16, 64, 65, 1000)):
        if isinstance(rule, NTKScaling):
            continue  # it has no name there
        parameters, original = to_transformers(rule)
        config = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=original,
                             rope_parameters=parameters)
        want, factor = reference[parameters["rope_type"]](config, "cpu", seq_len=length)
        got, got_factor = rule.frequencies(1000.0, 8, jnp.int32(length))
        np.testing.assert_allclose(got, want.numpy(), rtol=2e-6, err_msg=str(rule))
        assert got_factor == pytest.approx(factor, rel=1e-6), rule


def test_what_the_rules_promise():
    f = plain_frequencies(10000.0, 64)
    of = lambda rule, length=100: np.asarray(rule.frequencies(10000.0, 64, length)[0], np.float64)
    for length in (1, 63, 64):
        np.testing.assert_array_equal(of(DynamicNTK(4.0, 64), jnp.int32(length)), f.astype(np.float32))
    ntk = of(NTKScaling(4.0))
    assert ntk[0] == f[0] and math.isclose(ntk[-1], f[-1] / 4)
    np.testing.assert_allclose(of(DynamicNTK(1.0, 64), jnp.int32(256)), ntk, rtol=1e-6)  # the static rule, at s = 4
    yarn = of(YaRN(4.0, original=2048))
    fast, slow = 2048 * f / (2 * math.pi) > 40, 2048 * f / (2 * math.pi) < 0.7
    assert fast.sum() > 5 and slow.sum() > 5
    np.testing.assert_array_equal(yarn[fast], f[fast])
    np.testing.assert_allclose(yarn[slow], f[slow] / 4, rtol=1e-12)
    assert YaRN(1.0, 64).frequencies(100.0, 8, 9)[1] == 1.0
    assert LongRoPE(SHORT, LONG, 64, factor=1.0).frequencies(100.0, 8, 9)[1] == 1.0


def turn_slowly(config, vector, position, length):
    """A head's channels, pair by pair."""
    size = config.size or len(vector)
    f, factor = plain_frequencies(config.base, size), 1.0
    if config.scaling is not None:
        f, factor = paper_frequencies(config.scaling, config.base, size, length)
    out = np.array(vector)
    for j in range(size // 2):
        i, k = (2 * j, 2 * j + 1) if config.interleaved else (j, j + size // 2)
        c, s = factor * math.cos(position * f[j]), factor * math.sin(position * f[j])
        out[i], out[k] = vector[i] * c - vector[k] * s, vector[k] * c + vector[i] * s
    return out


@pytest.mark.parametrize("config", [
    Rotary(), Rotary(interleaved=True), Rotary(100.0, size=4), Rotary(size=6, interleaved=True),
    Rotary(scaling=YaRN(8.0, original=64)), Rotary(size=8, scaling=LongRoPE(SHORT, LONG, 64, 4.0)),
    Rotary(interleaved=True, scaling=DynamicNTK(2.0, 4)),
], ids=str)
def test_rotary_is_the_papers(float64, config):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 4, 7, 10)), rng.normal(size=(2, 2, 7, 10))
    tokens = tokens_of([[1] * 3 + [2] * 4, [1] * 7])
    for declared, length in ((None, 7), (jnp.int32(90), 90)):
        got = jax.jit(config.turn)(q, k, dataclasses.replace(tokens, context_length=declared))
        for mine, x in zip(got, (q, k)):
            for b, h, t in np.ndindex(x.shape[:3]):
                want = turn_slowly(config, x[b, h, t], int(tokens.positions[b, t]), length)
                np.testing.assert_allclose(mine[b, h, t], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", [
    Rotary(), Rotary(size=8, interleaved=True), Rotary(scaling=NTKScaling(4.0)), XPos(),
], ids=str)
def test_scores_depend_on_distance_alone(float64, config):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16), jnp.float64)
    turn = jax.jit(config.turn)

    def score(m, n):
        at = lambda p: dataclasses.replace(tokens_of([[1]]), positions=jnp.full((1, 1), p))
        return float(jnp.vdot(turn(q, k, at(m))[0], turn(q, k, at(n))[1]))

    for distance in (0, 1, 40):
        scores = [score(n + distance, n) for n in (0, 3, 500, 12000)]
        np.testing.assert_allclose(scores, scores[0], rtol=1e-9, atol=1e-10)
    assert abs(score(40, 0) - score(41, 0)) > 1e-3


def test_rotary_in_bfloat16_has_angles_in_float32():
    q = jnp.ones((1, 1, 1, 8))
    tokens = dataclasses.replace(tokens_of([[1]]), positions=jnp.full((1, 1), 30001))
    full, half = Rotary().turn(q, q, tokens)[0], Rotary().turn(q.astype(jnp.bfloat16), q, tokens)[0]
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.02)


def test_xpos_is_the_papers(float64):
    config, K = XPos(100.0, scale_base=8.0, gamma=0.3), 6
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 5, K))
    tokens = tokens_of([[1] * 5])
    turned = config.turn(jnp.asarray(q), jnp.asarray(k), tokens)
    for m, n in np.ndindex(5, 5):
        want = 0.0
        for j in range(K // 2):
            a, b = (complex(x[0, 0, p, j], x[0, 0, p, j + K // 2]) for x, p in ((q, m), (k, n)))
            zeta = (2 * j / K + 0.3) / 1.3
            turn = np.exp(1j * (m - n) * 100.0 ** (-2 * j / K))
            want += zeta ** ((m - n) / 8) * (a * turn * b.conjugate()).real
        np.testing.assert_allclose(turned[0][0, 0, m] @ turned[1][0, 0, n], want, rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_xpos_stays_finite(dtype):
    tokens = tokens_of(jnp.ones((1, 4)))
    tokens = dataclasses.replace(tokens, positions=jnp.array([[0, 5000, 20000, 10**6]]))
    q, k = jax.jit(XPos().turn)(*[jnp.ones((1, 1, 4, 8), dtype)] * 2, tokens)
    scores = jnp.einsum("BHTK,BHSK->BHTS", q.astype(jnp.float32), k.astype(jnp.float32))
    assert q.dtype == k.dtype == dtype and bool(jnp.isfinite(scores).all())
    assert abs(float(scores[0, 0, 3, 3]) - 8) < 0.2  # at no distance there is no decay, however far


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20])
def test_slopes_are_the_papers(heads):
    power = lambda n: [2 ** (-8 * (i + 1) / n) for i in range(n)]
    whole = 2 ** math.floor(math.log2(heads))
    want = power(whole) + power(2 * whole)[0::2][: heads - whole]
    np.testing.assert_allclose(ALiBi().slopes(heads), want, rtol=1e-12)
    np.testing.assert_allclose(ALiBi(scale=0.5).slopes(heads), np.array(want) / 2, rtol=1e-12)


@OF_TRANSFORMERS
def test_slopes_are_those_of_transformers():
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    torch = pytest.importorskip("torch")
    for heads in (1, 4, 6, 12, 71):
        theirs = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32).reshape(heads, 2)[:, 1]
        np.testing.assert_allclose(ALiBi().slopes(heads), theirs.numpy(), rtol=1e-6)
        theirs = -mpt.build_mpt_alibi_tensor(heads, 2, alibi_bias_max=6).reshape(heads, 2)[:, 0]
        np.testing.assert_allclose(ALiBi(max_bias=6.0).slopes(heads), theirs.numpy(), rtol=1e-6)


def test_linear_bias_falls_with_distance():
    distance = jnp.array([[[0, 3], [-2, 7]]])
    want = [[[[-0.0, -1.5], [-1.0, -3.5]], [[-0.0, -0.75], [-0.5, -1.75]]]]
    np.testing.assert_array_equal(jax.jit(lambda b, d: b(d))(LinearBias((0.5, 0.25)), distance), want)


def bucket_slowly(distance, buckets, farthest, causal):
    if not causal:
        buckets //= 2
        offset, distance = (buckets if distance < 0 else 0), abs(distance)
    else:
        offset, distance = 0, max(distance, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    starts = [exact * (farthest / exact) ** (i / (buckets - exact)) for i in range(buckets - exact)]
    return offset + exact - 1 + sum(distance >= start - 1e-6 for start in starts)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("buckets, farthest", [(32, 128), (16, 64), (6, 20), (64, 500)])
def test_buckets_are_those_of_t5(causal, buckets, farthest):
    distance = np.arange(-3 * farthest, 3 * farthest)
    got = bucket_of(distance, buckets, farthest, causal)
    np.testing.assert_array_equal(got, [bucket_slowly(d, buckets, farthest, causal) for d in distance])
    empty = set() if causal else {buckets // 2}  # of the later keys at no distance there are none
    assert set(got) == set(range(buckets)) - empty


@OF_TRANSFORMERS
def test_buckets_are_those_of_transformers():
    t5, torch = pytest.importorskip("transformers.models.t5.modeling_t5"), pytest.importorskip("torch")
    distance = np.arange(-2500, 2500)
    for buckets, farthest, causal in itertools.product((8, 20, 32, 64), (40, 128, 500, 1024), (True, False)):
        theirs = t5.T5Attention._relative_position_bucket(torch.tensor(-distance), not causal, buckets, farthest)
        np.testing.assert_array_equal(bucket_of(distance, buckets, farthest, causal), theirs.numpy())


@pytest.mark.parametrize("causal", [True, False])
def test_table_bias_and_its_gradient(float64, causal):
    rng = np.random.default_rng(0)
    table, distance = rng.normal(size=(8, 3)), rng.integers(-40, 40, size=(2, 5, 7))
    bias = TableBias(jnp.asarray(table), 20, causal)
    buckets = bucket_of(distance, 8, 20, causal)
    np.testing.assert_array_equal(jax.jit(lambda b, d: b(d))(bias, distance), np.moveaxis(table[buckets], -1, 1))
    dy = rng.normal(size=(2, 3, 5, 7))
    got = jax.grad(lambda b: (b(distance) * dy).sum())(bias).table
    want = np.zeros_like(table)
    for b, h, t, s in np.ndindex(dy.shape):
        want[buckets[b, t, s], h] += dy[b, h, t, s]
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("positions", [Rotary(size=4, scaling=YaRN(2.0, 16)), XPos(), ALiBi(), RelativePositions(),
                                       Temperature(0.5, 4), None], ids=str)
def test_attention_with_positions(float64, positions):
    """All at once, with every score kept, and in pieces through a state: the same numbers; and the table learns."""
    layers = (RelativeBias(3, buckets=8, max_distance=20), Attention(3, positions=positions))
    module = cast(jittered(Sequence(*layers).build(nnx.Rngs(0), Place(12))), jnp.float64)
    x = jax.random.normal(jax.random.key(0), (2, 40, 12), jnp.float64)
    tokens = tokens_of([[1] * 15 + [2] * 25, [1] * 37 + [0] * 3])
    run = jax.jit(lambda x, t, s: module(x, t, s))
    y, _, _ = run(x, tokens, None)

    @jax.jit
    def plain(x):
        bias, attention = module.layers
        told = tokens.provide(bias(x, tokens)[2].provides)
        places = core.Places(tokens.segments, tokens.positions)
        y = core.attend_plain(*attention.heads(x, told), places, places, attention.rules(told))
        return jnp.einsum("BHTK,HKD->BTD", y, attention.out[...])

    real = np.asarray(tokens.real)
    np.testing.assert_allclose(np.asarray(y)[real], np.asarray(plain(x))[real], rtol=1e-9, atol=1e-12)
    pieces = in_pieces(run, module.init_state(2, 40, jnp.float64), x, tokens, (9, 1, 30))
    np.testing.assert_allclose(np.asarray(pieces)[real], np.asarray(y)[real], rtol=1e-9, atol=1e-12)
    learns = jax.jit(jax.grad(lambda m: (m(x, tokens)[0] ** 2).sum()))(module).layers[0].table[...]
    assert bool((jnp.abs(learns) > 0).any()) == isinstance(positions, RelativePositions)


def test_temperature_is_llama_4s():
    tokens = dataclasses.replace(tokens_of(jnp.ones((1, 3))), positions=jnp.array([[0, 8190, 40000]]))
    q = jnp.ones((1, 2, 3, 4))
    got, k = Temperature().turn(q, 2 * q, tokens)
    want = [math.log(math.floor((p + 1) / 8192) + 1) * 0.1 + 1 for p in (0, 8190, 40000)]
    np.testing.assert_allclose(got[0, :, :, 0], [want, want], rtol=1e-6)
    np.testing.assert_array_equal(k, 2 * q)


@pytest.mark.parametrize("make, words", [
    (lambda: Rotary(base=1.0), "Rotary.base = 1.0: must be above 1"),
    (lambda: Rotary(size=3), "Rotary.size = 3: channels are turned in pairs"),
    (lambda: Rotary(size=16).check(8), "Rotary.size = 16: must be at most the head size 8"),
    (lambda: Rotary().check(7), "a head size of 7 is odd"),
    (lambda: XPos().check(7), "the head size 7 must be even"),
    (lambda: XPos(gamma=0.0), "XPos.gamma = 0.0"),
    (lambda: ALiBi(max_bias=0.0), "ALiBi.max_bias = 0.0"),
    (lambda: Temperature(floor=0), "Temperature.floor = 0"),
    (lambda: LinearScaling(0.5), "LinearScaling.factor = 0.5: must be at least 1"),
    (lambda: DynamicNTK(2.0, original=0), "DynamicNTK.original = 0"),
    (lambda: YaRN(2.0, 64, beta_fast=0.5), "YaRN.beta_fast = 0.5: must be at least beta_slow = 1.0"),
    (lambda: Rotary(scaling=LongRoPE(SHORT, (1.5, 4.0), 64, 2.0)).check(8), "LongRoPE.long = (1.5, 4.0): must be 4"),
    (lambda: LongRoPE((0.0,), (1.0,), 64, 2.0), "LongRoPE.short = (0.0,): must all be above 0"),
    (lambda: Llama3Scaling(8.0, 4.0, 1.0, 64), "Llama3Scaling.high = 1.0: must be at least low = 4.0"),
    (lambda: ProportionalScaling(1.5), "ProportionalScaling.share = 1.5"),
    (lambda: RelativeBias(4, buckets=7, causal=False), "RelativeBias.buckets = 7: must be even"),
    (lambda: RelativeBias(4, max_distance=16), "RelativeBias.max_distance = 16: must be above 16"),
    (lambda: RelativePositions().bias(4, tokens_of([[1]])), "put a RelativeBias layer before"),
    (lambda: RelativePositions().bias(4, tokens_of([[1]]).provide(
        {"relative_bias": TableBias(jnp.ones((8, 2)), 20, True)})), "has 2 heads, the attention 4"),
])
def test_bad_input(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize("config", [Rotary(size=8, scaling=rule) for rule in SCALINGS] + [XPos(), ALiBi(2.0)], ids=str)
def test_json(config):
    assert from_json(config.to_json()) == config
