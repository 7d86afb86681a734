"""The page about a run's experts says what the model does; what has no experts is told so."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import archlab
from archlab.data import load_corpus
from archlab.data.tokenizers import BpeTokenizer
from archlab.layers.mlp import SwiGLU
from archlab.layers.residual import Residual
from archlab.model import LanguageModel
from archlab.training.loop import Run, train

ROOT = Path(__file__).parents[2]
TEXT = "def f(x): return '<b>' + x  # é</script>"


def inspect(*flags):
    return subprocess.run([sys.executable, "-m", "experiments.inspect", *flags], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A short run of a mixture of experts over a file."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(" ".join(f"the {i}th line says {i * i} and no more\n" for i in range(400)))
    run = Run(archlab.get_config("mixture-of-experts-nano"), steps=4, batch=2, context=16,
              data=f"text:{folder / 'text.txt'}")
    train(run, out=folder / "moe", log_every=1, eval_batches=1, tensorboard=False, quiet=True)
    return folder


def routing(page):
    return json.loads(re.search(r'id="routing">(.*?)</script>', page.read_text()).group(1))["layers"]


def test_a_text_through_a_run(folder, tmp_path):
    out = tmp_path / "deep" / "page.html"
    done = inspect(f"--checkpoint={folder / 'moe'}", f"--text={TEXT}", "--context=64", f"--out={out}")
    assert done.returncode == 0, done.stderr
    page, ids = out.read_text(), np.frombuffer(TEXT.encode(), np.uint8)
    assert f"{len(ids)} tokens through 2 layers" in done.stdout
    tokens = page.split('<div class="tokens routed">')[1].split("</div>")[0]
    assert "Load over training" in page and tokens.count("<") == 2 * len(ids)  # spans alone
    traces = archlab.load(folder / "moe")(jnp.asarray(ids, jnp.int32)[None]).aux.traces
    expected = np.asarray(traces["body/unit/layers/1/layer/choices"])[:, 0]
    found = [np.array(layer["choices"]).reshape(-1, 2) for layer in routing(out)]
    assert np.mean(np.stack(found) == expected) > 0.95  # the shape of the batch may flip a near tie


def test_validation_text_by_default_and_a_file(folder, tmp_path):
    done = inspect(f"--checkpoint={folder / 'moe'}", "--rows=3", f"--out={tmp_path / 'page.html'}")
    assert done.returncode == 0 and "48 tokens through 2 layers" in done.stdout, done.stderr
    assert "validation side" in (tmp_path / "page.html").read_text()
    saved = tmp_path / "saved"
    archlab.save(archlab.load(folder / "moe"), saved)
    BpeTokenizer.train(load_corpus(f"text:{folder / 'text.txt'}"), 256).save(saved / "tokenizer.json")
    (tmp_path / "words.txt").write_text("some words")
    done = inspect(f"--checkpoint={saved}", f"--file={tmp_path / 'words.txt'}", f"--out={tmp_path / 'page.html'}")
    assert done.returncode == 0 and "10 tokens" in done.stdout, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert "Load over training" not in page and "<span>e</span><span> </span><span>w</span>" in page


@pytest.mark.parametrize("flags, words", [
    (["--checkpoint=DENSE", "--text=abc"], "no layer with experts"),
    (["--checkpoint=DENSE", "--text="], "the text is empty"),
    (["--checkpoint=DENSE", "--text=a", "--file=b"], "give one of"),
    (["--text=a"], "give --checkpoint"),
])
def test_bad_input(tmp_path, flags, words):
    if "DENSE" in flags[0]:
        dense = LanguageModel(256, 8, Residual(SwiGLU(8)))
        archlab.save(archlab.create_model(dense, nnx.Rngs(0)), tmp_path / "dense")
    done = inspect(*(flag.replace("DENSE", str(tmp_path / "dense")) for flag in flags), f"--out={tmp_path / 'x.html'}")
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x.html").exists()
