"""Checkpoints under the official names of RWKV-5, 6 and 7, against a float64 loop over them as they lie in the file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import archlab
from tests.helpers import cast
from tests.recurrence.against import sigmoid, silu

V, D, L, N, F = 30, 12, 3, 4, 20  # vocabulary, width, layers, head size, hidden
H = D // N
SIZES = dict(vocab_size=V, hidden_size=D, num_hidden_layers=L, head_size=N, intermediate_size=F)
IDS = np.random.default_rng(5).integers(0, V, 9)


def shapes(version: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the official model, by name."""
    vector, found = (1, 1, D), {"emb.weight": (V, D), "head.weight": (V, D), "ln_out.weight": (D,), "ln_out.bias": (D,),
                                "blocks.0.ln0.weight": (D,), "blocks.0.ln0.bias": (D,)}
    for i in range(L):
        block = {f"{norm}.{kind}": (D,) for norm in ("ln1", "ln2", "att.ln_x") for kind in ("weight", "bias")}
        block |= {f"att.{name}.weight": (D, D) for name in ("receptance", "key", "value", "output")}
        block |= {"ffn.key.weight": (F, D), "ffn.value.weight": (D, F)}
        if version < 7:
            block |= {"att.gate.weight": (D, D), "ffn.receptance.weight": (D, D), "att.time_faaaa": (H, N)}
        if version == 5:
            block |= {f"att.time_mix_{c}": vector for c in "kvrg"} | {f"ffn.time_mix_{c}": vector for c in "kr"}
            block |= {"att.time_decay": (H, N)}
        if version == 6:
            block |= {f"att.time_maa_{c}": vector for c in "xwkvrg"} | {f"ffn.time_maa_{c}": vector for c in "kr"}
            block |= {"att.time_maa_w1": (D, 5 * 3), "att.time_maa_w2": (5, 3, D), "att.time_decay": vector,
                      "att.time_decay_w1": (D, 2), "att.time_decay_w2": (2, D)}
        if version == 7:
            block |= {f"att.x_{c}": vector for c in "rwkvag"} | {"ffn.x_k": vector, "att.r_k": (H, N)}
            block |= {f"att.{name}": vector for name in ("k_k", "k_a", "w0", "a0", "v0")}
            for c, rank in RANKS.items():
                block |= {f"att.{c}1": (D, rank), f"att.{c}2": (rank, D)}
            if i == 0:
                block = {name: shape for name, shape in block.items() if name not in ("att.v0", "att.v1", "att.v2")}
        found |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return found


RANKS = {"w": 2, "a": 3, "v": 5, "g": 6}
FIELDS = {5: {}, 6: dict(mix_rank=3, decay_rank=2),
          7: dict(decay_rank=2, rate_rank=3, value_rank=5, gate_rank=6)}


def norm(x, z, name, groups=1, eps=1e-5):
    x = x.reshape(groups, -1)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + eps)
    return x.ravel() * z[f"{name}.weight"] + z[f"{name}.bias"]


def outer(r, k, v, w, u, S):
    """One step of RWKV-5 and RWKV-6; S [H, keys, values]."""
    kv = k.reshape(H, N, 1) * v.reshape(H, 1, N)
    y = (r.reshape(H, N, 1) * (S + u.reshape(H, N, 1) * kv)).sum(1)
    return y.ravel(), w.reshape(H, N, 1) * S + kv


def time_mix_5(z, x, last, S, first):
    mix = lambda c: x * z[f"time_mix_{c}"] + last * (1 - z[f"time_mix_{c}"])
    r, k, v, g = (z[f"{name}.weight"] @ mix(name[0]) for name in ("receptance", "key", "value", "gate"))
    y, S = outer(r, k, v, np.exp(-np.exp(z["time_decay"])), z["time_faaaa"], S)
    return z["output.weight"] @ (norm(y / 8, z, "ln_x", H) * silu(g)), S, first


def time_mix_6(z, x, last, S, first):
    xx = last - x
    m = np.tanh((x + xx * z["time_maa_x"]) @ z["time_maa_w1"]).reshape(5, -1)
    m = {c: m[i] @ z["time_maa_w2"][i] for i, c in enumerate("wkvrg")}
    mix = lambda c: x + xx * (z[f"time_maa_{c}"] + m[c])
    r, k, v, g = (z[f"{name}.weight"] @ mix(name[0]) for name in ("receptance", "key", "value", "gate"))
    w = z["time_decay"] + np.tanh(mix("w") @ z["time_decay_w1"]) @ z["time_decay_w2"]
    y, S = outer(r, k, v, np.exp(-np.exp(w)), z["time_faaaa"], S)
    return z["output.weight"] @ (norm(y, z, "ln_x", H, 64e-5) * silu(g)), S, first


def time_mix_7(z, x, last, S, first):
    """S [H, values, keys]; `first` is None in the first layer."""
    mix = lambda c: x + (last - x) * z[f"x_{c}"]
    r, k, v = (z[f"{name}.weight"] @ mix(name[0]) for name in ("receptance", "key", "value"))
    w = np.exp(-np.exp(-0.5) * sigmoid(z["w0"] + np.tanh(mix("w") @ z["w1"]) @ z["w2"]))
    if first is None:
        first = v
    else:
        v = v + (first - v) * sigmoid(z["v0"] + mix("v") @ z["v1"] @ z["v2"])
    a = sigmoid(z["a0"] + mix("a") @ z["a1"] @ z["a2"])
    g = sigmoid(mix("g") @ z["g1"]) @ z["g2"]
    kk = (k * z["k_k"]).reshape(H, N)
    kk = kk / np.linalg.norm(kk, axis=1, keepdims=True)
    k = k * (1 + (a - 1) * z["k_a"])
    r, w, k, v, a = (array.reshape(H, N) for array in (r, w, k, v, a))
    y = np.zeros((H, N))
    for h in range(H):
        S[h] = S[h] * w[h] - np.outer(S[h] @ kk[h], kk[h] * a[h]) + np.outer(v[h], k[h])
        y[h] = S[h] @ r[h]
    y = norm(y, z, "ln_x", H, 64e-5) + ((r * k * z["r_k"]).sum(1, keepdims=True) * v).ravel()
    return z["output.weight"] @ (y * g), S, first


def channel_mix(z, x, last, version):
    if version == 5:
        mix = lambda c: x * z[f"time_mix_{c}"] + last * (1 - z[f"time_mix_{c}"])
    else:
        mix = lambda c: x + (last - x) * z[f"time_maa_{c}" if version == 6 else f"x_{c}"]
    y = z["value.weight"] @ np.maximum(z["key.weight"] @ mix("k"), 0) ** 2
    return y if version == 7 else sigmoid(z["receptance.weight"] @ mix("r")) * y


def official(version: int, weights: dict, ids) -> np.ndarray:
    """Logits [T, V], token by token."""
    z = {name: array.astype(np.float64).squeeze() for name, array in weights.items()}
    part = lambda prefix: {name.removeprefix(prefix): array for name, array in z.items() if name.startswith(prefix)}
    time_mix = {5: time_mix_5, 6: time_mix_6, 7: time_mix_7}[version]
    lasts, S, logits = np.zeros((L, 2, D)), np.zeros((L, H, N, N)), []
    for token in ids:
        x, first = norm(z["emb.weight"][token], z, "blocks.0.ln0"), None
        for i in range(L):
            now = norm(x, z, f"blocks.{i}.ln1")
            y, S[i], first = time_mix(part(f"blocks.{i}.att."), now, lasts[i, 0], S[i], first)
            lasts[i, 0], x = now, x + y
            now = norm(x, z, f"blocks.{i}.ln2")
            y = channel_mix(part(f"blocks.{i}.ffn."), now, lasts[i, 1], version)
            lasts[i, 1], x = now, x + y
        logits.append(z["head.weight"] @ norm(x, z, "ln_out"))
    return np.stack(logits)


def write(folder, version: int) -> dict:
    source = np.random.default_rng(version)
    weights = {}
    for name, shape in shapes(version).items():
        noise = source.normal(size=shape)
        weights[name] = (1 + 0.3 * noise if "ln" in name and "weight" in name else
                         noise * shape[-1] ** -0.5 if len(shape) == 2 else 0.7 * noise).astype(np.float32)
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": f"rwkv{version}", **SIZES, **FIELDS[version]}))
    return weights


@pytest.mark.parametrize("version", [5, 6, 7])
def test_official_names(float64, version, tmp_path):
    weights = write(tmp_path / "a", version)
    model = archlab.load(tmp_path / "a")
    logits = jax.jit(lambda m, ids: m(ids).logits)(cast(model, jnp.float64), jnp.asarray(IDS)[None])
    np.testing.assert_allclose(logits[0], official(version, weights, IDS), rtol=1e-9, atol=1e-9)
    archlab.save(model, tmp_path / "b", format="huggingface")
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert set(again) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    assert archlab.load(tmp_path / "b").config == model.config


def test_what_the_first_layer_of_rwkv7_does_not_use_is_passed_over(tmp_path):
    weights = write(tmp_path, 7)
    unused = {f"blocks.0.att.v{i}": weights[f"blocks.1.att.v{i}"] for i in range(3)}
    save_file(weights | unused, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(archlab.load(tmp_path).embed.table, weights["emb.weight"])


def test_sizes_that_are_wrong_or_missing_are_told(tmp_path):
    write(tmp_path, 6)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"decay_rank": 7}))
    with pytest.raises(ValueError, match=r"time_decay_w1 is \[12, 2\], must be \[12, 7\]"):
        archlab.load(tmp_path)
    del fields["hidden_size"]
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="hidden_size is missing"):
        archlab.load(tmp_path)


@pytest.mark.parametrize("name", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_models_of_the_zoo_are_exported(name, tmp_path):
    config = archlab.get_config(f"{name}-nano")
    model = jax.jit(lambda: config.build(archlab.zoo.nnx.Rngs(0)))()
    archlab.save(model, tmp_path, format="huggingface")
    forward, ids = jax.jit(lambda m, ids: m(ids).logits), jnp.arange(6)[None]
    np.testing.assert_allclose(forward(archlab.load(tmp_path), ids), forward(model, ids), atol=1e-5)
