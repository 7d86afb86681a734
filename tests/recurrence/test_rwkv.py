"""RWKV-4 to RWKV-7 against float64 loops written from their papers, their initialisation, and what they refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import archlab
from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.recurrence.rwkv4 import RWKV4, ChannelMix4, RWKV4State, doubling, one_by_one, weighted_average
from archlab.recurrence.rwkv5 import RWKV5, ChannelMix5
from archlab.recurrence.rwkv6 import TARGETS, RWKV6, ChannelMix6
from archlab.recurrence.rwkv7 import FIRST, RWKV7, ChannelMix7
from tests.helpers import tokens_of
from tests.recurrence.against import D, SEGMENTS, check, sigmoid, silu

AT = Place(D, 2, 6)  # the second of three layers


def shifted(x):
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def of_the_token(w, x, name):
    """RWKV-4 and RWKV-5: mu says how much of the token itself."""
    return w[f"mix_{name}"] * x + (1 - w[f"mix_{name}"]) * shifted(x)


def of_the_one_before(w, x, name, more=0):
    """RWKV-6 and RWKV-7: mu says how much of the token before."""
    return x + (shifted(x) - x) * (w[f"mix_{name}"] + more)


def flat(weight):
    """[D, H, K] or [R, H, K] as [D, HK]."""
    return weight.reshape(len(weight), -1)


def rwkv4(w, x):
    k, v, r = (of_the_token(w, x, name) @ w[name] for name in ("key", "value", "receptance"))
    decay, y = np.exp(w["decay"]), np.zeros_like(v)
    for t in range(len(x)):  # equation 16, with every sum written out
        own = np.exp(w["bonus"] + k[t])
        past = [np.exp(-(t - 1 - i) * decay + k[i]) for i in range(t)]
        y[t] = (sum((e * v[i] for i, e in enumerate(past)), own * v[t])) / sum(past, own)
    return (sigmoid(r) * y) @ w["out"]


def heads(y, w):
    """The norm of one token's heads, [H, K]."""
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 64e-5)
    return y * w["norm/scale"] + w["norm/bias"]


def bonus_recurrence(w, r, k, v, decay, gate):
    """Equations 5 and 18 of Eagle and Finch. r, k, v, decay, gate: [T, H, K]."""
    S, outs = np.zeros((*r.shape[1:], r.shape[2])), []
    for t in range(len(r)):
        kv = k[t][:, :, None] * v[t][:, None, :]
        y = np.einsum("hk,hkp->hp", r[t], S + w["bonus"][:, :, None] * kv)
        S = decay[t][:, :, None] * S + kv
        outs.append((silu(gate[t]) * heads(y, w)).ravel() @ w["out"].reshape(-1, w["out"].shape[-1]))
    return np.stack(outs)


def rwkv5(w, x):
    split = lambda a: a.reshape(len(x), *w["bonus"].shape)
    r, k, v, g = (split(of_the_token(w, x, name) @ flat(w[name])) for name in ("receptance", "key", "value", "gate"))
    return bonus_recurrence(w, r, k, v, np.broadcast_to(np.exp(-np.exp(w["decay"])), r.shape), g)


def rwkv6(w, x):
    split = lambda a: a.reshape(len(x), *w["bonus"].shape)
    base = np.tanh(of_the_one_before(w, x, "base") @ w["mix_down"])
    rank = base.shape[1] // 5
    mixed = {name: of_the_one_before(w, x, name, base[:, i * rank:(i + 1) * rank] @ w["mix_up"][i])
             for i, name in enumerate(TARGETS)}
    r, k, v, g = (split(mixed[name] @ flat(w[name])) for name in ("receptance", "key", "value", "gate"))
    decay = w["decay/bias"] + split(np.tanh(mixed["decay"] @ w["decay/down"]) @ flat(w["decay/up"]))
    return bonus_recurrence(w, r, k, v, np.exp(-np.exp(decay)), g)


def first_values(x):
    """What a first layer could have published, a function of the document alone."""
    return np.cos(3 * x) + 0.5


def rwkv7(w, x, reach=1):
    split = lambda a: a.reshape(len(x), *w["bonus"].shape)
    mixed = lambda name: of_the_one_before(w, x, name)
    low_rank = lambda name, act, x: split(act(x @ w[f"{name}/down"]) @ flat(w[f"{name}/up"])) + w.get(f"{name}/bias", 0)
    same = lambda a: a
    r, k, v = (split(mixed(name) @ flat(w[name])) for name in ("receptance", "key", "value"))
    if "blend/bias" in w:
        v = v + (split(first_values(x)) - v) * sigmoid(low_rank("blend", same, mixed("value")))
    decay = np.exp(-np.exp(-0.5) * sigmoid(low_rank("decay", np.tanh, mixed("decay"))))
    a = reach * sigmoid(low_rank("rate", same, mixed("rate")))
    g = low_rank("gate", sigmoid, mixed("gate"))
    kk = k * w["removal"]
    kk = kk / np.linalg.norm(kk, axis=-1, keepdims=True)
    k = k * (1 + (a - 1) * w["replacement"])
    H, K = w["bonus"].shape
    S, outs = np.zeros((H, K, K)), []  # [values, keys], as in the paper
    for t in range(len(x)):
        y = np.zeros((H, K))
        for h in range(H):
            S[h] = S[h] @ (np.diag(decay[t, h]) - np.outer(kk[t, h], a[t, h] * kk[t, h])) + np.outer(v[t, h], k[t, h])
            y[h] = S[h] @ r[t, h]
        y = heads(y, w) + (r[t] * k[t] * w["bonus"]).sum(-1, keepdims=True) * v[t]
        outs.append((y * g[t]).ravel() @ w["out"].reshape(-1, w["out"].shape[-1]))
    return np.stack(outs)


def channel_mix(mixture):
    def layer(w, x):
        y = np.maximum(mixture(w, x, "key") @ w["key"], 0) ** 2 @ w["value"]
        return y if "receptance" not in w else sigmoid(mixture(w, x, "receptance") @ w["receptance"]) * y

    return layer


SMALL = dict(decay_rank=3, rate_rank=2, gate_rank=5)
LAYERS = [(RWKV4(), rwkv4), (RWKV5(4), rwkv5), (RWKV6(4, 3, 2), rwkv6),
          (RWKV7(4, value_rank=None, **SMALL), rwkv7), (ChannelMix4(12), channel_mix(of_the_token)),
          (ChannelMix5(12), channel_mix(of_the_token)), (ChannelMix6(12), channel_mix(of_the_one_before)),
          (ChannelMix7(12), channel_mix(of_the_one_before))]


@pytest.mark.parametrize("config, reference", LAYERS, ids=[repr(config) for config, _ in LAYERS])
def test_the_layers_are_the_papers(float64, config, reference):
    check(config, reference, AT)


def test_later_layers_of_rwkv7_read_the_first_values(float64):
    x = np.random.default_rng(0).normal(size=(*SEGMENTS.shape, D))  # the very text of `check`
    config, reference = RWKV7(4, value_rank=2, negative=True, **SMALL), functools.partial(rwkv7, reach=2)
    check(config, reference, AT, lambda t: t.provide({FIRST: jnp.asarray(first_values(x))}))


def test_rwkv7_publishes_its_first_values():
    """In the model, where all layers but the first stand in a `Repeat`."""
    config = archlab.get_config("rwkv7-nano")
    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    table = np.asarray(model.embed.table[...])
    aux = jax.jit(lambda ids: model(ids).aux)(jnp.arange(5)[None])
    (path,) = [path for path in aux.traces if path.endswith("value")]
    normed = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = normed(normed(table[:5]))
    layer = model.body.layers[1].layer.layers[0].layer
    mix = {"mix_value": np.asarray(layer.mix_value[...])}
    want = of_the_one_before(mix, x, "value") @ flat(np.asarray(layer.value[...]))
    np.testing.assert_allclose(aux.traces[path][0], want, rtol=1e-4, atol=1e-5)


def test_rwkv7_wants_first_values():
    alone = dataclasses.replace(archlab.get_config("rwkv7-nano"), body=Sequence(Residual(RWKV7(8))))
    with pytest.raises(ValueError, match="RWKV7.value_rank = 32: wants the first layer's values"):
        jax.eval_shape(lambda: alone.build(nnx.Rngs(0))(jnp.arange(5)[None]))


def test_rwkv4_survives_large_keys():
    """Exponents far beyond float32, a document boundary among them, against softmax-like sums in float64."""
    source = np.random.default_rng(0)
    k, v = 60 * source.normal(size=(1, 40, 3)), source.normal(size=(1, 40, 3))
    segments, w, u = np.array([[1] * 15 + [2] * 25]), np.array([1e-3, 1.0, 20.0]), np.array([-50.0, 0.0, 50.0])
    past, f32 = RWKV4State.zeros(1, 3, jnp.float32), lambda a: jnp.asarray(a, jnp.float32)
    run = jax.jit(lambda k, v, w, u: weighted_average(k, v, w, u, tokens_of(segments), past))
    y, _, peak = run(*map(f32, (k, v, w, u)))
    for t in range(40):
        start = 0 if t < 15 else 15
        log = np.concatenate([k[0, start:t] - np.arange(t - start)[::-1, None] * w, k[0, t:t + 1] + u])
        weight = np.exp(log - log.max(0))
        want = (weight * v[0, start:t + 1]).sum(0) / weight.sum(0)
        np.testing.assert_allclose(y[0, t], want, rtol=1e-3, atol=1e-4)
    age = np.arange(25)[::-1, None]
    np.testing.assert_allclose(peak[0], (k[0, 15:] - age * w).max(0), rtol=1e-5)
    grads = jax.grad(lambda *a: run(*a)[0].sum(), argnums=(0, 1, 2, 3))(*map(f32, (k, v, w, u)))
    assert all(np.isfinite(g).all() for g in grads)


@functools.cache
def builder(config):
    return jax.jit(lambda index: config.build(nnx.Rngs(0), Place(64, index, 12)))


def built(config, index):
    """The parameters of a layer of six; where it stands is not known when it is compiled, as in a `Repeat`."""
    return parameters_of(builder(config)(index))


def test_rwkv4s_peaks_by_doubling(float64):
    """What accelerators run."""
    k, w = np.random.default_rng(0).normal(size=(2, 21, 3)), np.array([0.01, 0.3, 5.0])
    starts = np.zeros((2, 21, 1), bool)
    starts[0, [0, 9, 10]] = True
    last = jnp.array([[9.0] * 3, [1.5] * 3])
    for length in (8, 21):
        args = jnp.asarray(k)[:, :length], w, starts[:, :length], last
        np.testing.assert_allclose(jax.jit(doubling)(*args), jax.jit(one_by_one)(*args), rtol=1e-12)


def gram(weight):
    """The products of its columns."""
    matrix = flat(np.asarray(weight[...]))
    return matrix.T @ matrix


def test_published_initialisation():
    """The first and the last of six layers, in terms of i / D, n / (D - 1), l / L and l / (L - 1), as published."""
    i, n, close = np.arange(64) / 64, np.arange(64) / 63, lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    zigzag = np.array([(j + 1) % 3 - 1 for j in range(64)])
    for index, rising, falling in ((0, 0, 1), (10, 1, 1 / 6)):
        p = built(RWKV4(), index)
        close(p["mix_value"][...], i**falling + 0.3 * rising)
        close(p["mix_receptance"][...], i ** (falling / 2))
        close(p["decay"][...], -5 + 8 * n ** (0.7 + 1.3 * rising))
        close(p["bonus"][...], np.log(0.3) + zigzag / 2)
        for p in (built(RWKV5(32), index), built(RWKV6(32), index)):
            decay = p["decay"] if "decay" in p else p["decay/bias"]
            close(decay[...].ravel(), -6 + 5 * n ** (0.7 + 1.3 * rising))
            close(p["bonus"][...].ravel(), rising * (1 - n) + zigzag / 10)
            close(p["norm/scale"][...], np.full((2, 32), ((1 + 5 * rising) / 6) ** 0.7))
            close(gram(p["value"]), np.eye(64))
            close(gram(p["key"]), np.eye(64) / 100)
            assert not p["out"][...].any()
        close(p["mix_value"][...], 1 - i**falling - 0.3 * rising)
        close(built(ChannelMix6(224), index)["mix_key"][...], 1 - i**falling)
        p = built(RWKV7(32), index)
        s = (np.arange(64) % 32 - 15.5) / 15.5
        close(p["decay/bias"][...].ravel(), -5.5 + 6 * n ** (1 + rising**0.3) + 2.5 * s * abs(s))
        close(p["rate/bias"][...].ravel(), -0.19 + 0.3 * s * abs(s) + 0.4 * (n - 0.5))
        close(p["blend/bias"][...].ravel(), 0.73 - 0.4 * (n - 0.5))
        close(p["removal"][...].ravel(), 0.71 - 0.1 * (n - 0.5))
        close(p["mix_gate"][...], 1 - i ** (0.2 * falling))
        close(gram(p["gate/up"]), np.eye(64) * 0.02)  # gain 0.1 sqrt(128 / 64)
        assert 0.95 < np.abs(p["key"][...]).max() * 8 / 0.05 <= 1 < np.abs(p["value"][...]).max() * 8 / 0.05
        close(built(ChannelMix7(256), index)["mix_key"][...], 1 - i ** falling**4)


@pytest.mark.parametrize("config, faster", [
    (RWKV4(), {"decay": 2.0, "bonus": 3.0}), (RWKV5(32), {"decay": 2.0}), (RWKV6(32), {"decay/bias": 2.0}),
    (RWKV7(32), {"decay/bias": 2.0})])
def test_published_groups_of_parameters(config, faster):
    p = built(config, 0)
    assert {path: v.rate for path, v in p.items() if v.rate != 1} == faster
    assert {path for path, v in p.items() if v.decay} == \
        {"receptance", "key", "value", "out"} | ({"gate"} & set(p))


def test_what_does_not_fit():
    for config in (RWKV5(5), RWKV6(5), RWKV7(5)):
        with pytest.raises(ValueError, match=f"{type(config).__name__}.head_size = 5: must divide the width 8"):
            config.check(8)
    for config, fields in ((RWKV6, "head_size mix_rank decay_rank"), (RWKV5, "head_size"),
                           (RWKV7, "head_size decay_rank rate_rank value_rank gate_rank"), (ChannelMix4, "hidden"),
                           (ChannelMix6, "hidden"), (ChannelMix7, "hidden")):
        for field in fields.split():
            with pytest.raises(ValueError, match=f"{field} = 0: must be at least 1"):
                config(**{field: 0})
