"""Numbers of four bits with shared exponents, against a loop over bits."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import archlab
from archlab.hub.mxfp4 import decoded
from archlab.layers.weights import split

FIXTURE = Path(__file__).parent / "fixtures" / "gpt_oss-mxfp4"


def number(code: int) -> float:
    """Four bits: sign, two of exponent (bias 1), one of mantissa; without an implied one where the exponent is 0."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def test_every_byte_at_every_exponent():
    rng = np.random.default_rng(0)
    blocks = np.stack([rng.permutation(256) for _ in range(32)]).astype(np.uint8).reshape(2, 16, 16, 16)
    scales = np.resize(np.arange(255, dtype=np.uint8), (2, 16, 16))
    with np.errstate(over="ignore"):
        got = decoded(blocks, scales)
    assert got.shape == (2, 512, 16) and got.dtype == ml_dtypes.bfloat16
    for e in range(2):
        for out in range(16):
            for i in range(512):
                byte = int(blocks[e, out, i // 32, i % 32 // 2])
                want = number(byte >> 4 if i % 2 else byte & 15) * 2.0 ** (int(scales[e, out, i // 32]) - 127)
                assert float(got[e, i, out]) == (want if abs(want) < 2.0**128 else np.copysign(np.inf, want))
    assert np.isnan(decoded(blocks, np.full_like(scales, 255)).astype(np.float32)).all()


def copied(folder: Path, tensors: dict, config: dict | None = None) -> Path:
    folder.mkdir()
    values = json.loads((FIXTURE / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_halves_in_different_files(tmp_path):
    """Blocks in one shard and their exponents in another, read with threads, and experts one after another."""
    tensors = load_file(FIXTURE / "model.safetensors")
    files = {name: "b" if name.endswith("_scales") else "a" for name in tensors}
    for file in "ab":
        save_file({name: x for name, x in tensors.items() if files[name] == file}, tmp_path / f"{file}.safetensors")
    index = {"weight_map": {name: f"{file}.safetensors" for name, file in files.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(FIXTURE / "config.json", tmp_path)
    whole, cut = (split(archlab.load(folder))[1] for folder in (FIXTURE, tmp_path))
    assert {str(array.dtype) for array in cut.values()} == {"bfloat16"}
    for path in whole:
        np.testing.assert_array_equal(whole[path], cut[path], err_msg=path)


def test_what_is_no_such_pair(tmp_path):
    tensors, name = load_file(FIXTURE / "model.safetensors"), "model.layers.0.mlp.experts.down_proj"
    alone = {key: x for key, x in tensors.items() if key != f"{name}_scales"}
    with pytest.raises(ValueError, match=rf"(?s)missing: {name} .*not expected: {name}_blocks"):
        archlab.load(copied(tmp_path / "alone", alone))
    with pytest.raises(ValueError, match=rf"(?s)missing: {name} .*not expected: {name}_blocks"):
        archlab.load(copied(tmp_path / "short", tensors | {f"{name}_scales": tensors[f"{name}_scales"][:, 1:]}))
    with pytest.raises(ValueError, match=r"quantization_config.quant_method = 'fp8' is not supported"):
        archlab.load(copied(tmp_path / "fp8", tensors, {"quantization_config": {"quant_method": "fp8"}}))
