"""What is said about experts, held against slow loops; and the page that says it."""

import json
import re
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from flax import nnx

from archlab.analysis.expert_page import expert_page
from archlab.analysis.experts import ExpertLayer, coactivation, load_by_class, load_over_training, look
from archlab.analysis.token_classes import CLASSES, token_classes
from archlab.data import Batch
from archlab.encoder_decoder import EncoderDecoder
from archlab.experts.capacity import Capacity
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.model import LanguageModel
from archlab.training.objectives import run

HOSTILE = b'</script><script>alert("x")</script><img src=x onerror=alert(1)>'


def batch_of(rows, length, padding=0):
    ids = np.random.default_rng(0).integers(0, 32, (rows, length)).astype(np.int32)
    segments = np.ones_like(ids)
    segments[-1, length - padding:] = 0
    return Batch(ids, np.zeros_like(ids), segments, np.zeros(ids.shape, np.float32))


def model_of(*layers, **fields):
    return jax.jit(lambda: LanguageModel(32, 8, Repeat(Residual(MoE(*layers, **fields)), 2)).build(nnx.Rngs(0)))()


def drawn(n, k, experts, seed=0):
    """Choices of n tokens, no expert twice; the last few went to nobody."""
    rng = np.random.default_rng(seed)
    choices = np.stack([rng.permutation(experts)[:k] for _ in range(n)])
    choices[-3:, -1] = -1
    return choices


def test_coactivation():
    choices, E = drawn(40, 3, 6), 6
    expected = np.zeros((E, E))
    for i in range(E):
        went = [set(row) for row in choices.tolist() if i in row]
        for j in range(E):
            if i != j and went:
                expected[i, j] = sum(j in row for row in went) / len(went)
    np.testing.assert_allclose(coactivation(choices, E), expected)
    assert not coactivation(np.array([[0, 1]]), 4)[2:].any()


def test_load_by_class():
    choices, classes = drawn(40, 2, 5), np.random.default_rng(1).integers(0, 3, 40)
    expected = np.zeros((4, 5))
    for c in range(3):
        fell = [e for row, of in zip(choices.tolist(), classes) if of == c for e in row if e >= 0]
        expected[c] = [fell.count(e) / len(fell) for e in range(5)]
    np.testing.assert_allclose(load_by_class(choices, classes, 4, 5), expected)


def test_load_over_training_takes_the_rows_that_have_it():
    rows = [{"step": 1, "load": {"a": [0.5, 0.5]}}, {"step": 3, "collapse": {}}, {"step": 4, "load": {"a": [1.0, 0.0]}}]
    steps, loads = load_over_training(rows, "a")
    assert steps.tolist() == [1, 4] and loads.tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert len(load_over_training(rows, "b")[0]) == 0


@pytest.mark.parametrize("text, kinds", [
    ("def f(x)\n", ["code"] * 3 + ["whitespace", "code", "punctuation", "code", "punctuation", "whitespace"]),
    ("It is so, 9 times.", ["prose"] * 2 + ["whitespace"] + ["prose"] * 2 + ["whitespace"] + ["prose"] * 2
     + ["punctuation", "whitespace", "digits", "whitespace"] + ["prose"] * 5 + ["punctuation"]),
    ("é", ["beyond ASCII"] * 2),
])
def test_classes_of_single_bytes(text, kinds):
    assert [CLASSES[c] for c in token_classes([bytes([b]) for b in text.encode()])] == kinds


@pytest.mark.parametrize("line, code", [
    ("import os", True), ("    return self.value", True), ("x = 3", True), ("for i in range(n):", True),
    ("if (a && b) { run(); }", True), ("A sentence of words: it ends.", False), ("# a comment in plain words", False),
    ("The value (in milliseconds) is ignored.", False), ("", False)])
def test_lines_of_code(line, code):
    """Each token is judged by the line that its first visible byte is in."""
    pieces = [b"A line of prose before it", b"\n" + line.encode() + b" word\n", b"and one of prose", b"\n", b"", b" 42"]
    kinds = [CLASSES[c] for c in token_classes(pieces)]
    assert kinds == ["prose", "code" if code else "prose", "prose", "whitespace", "special", "digits"]


def test_a_look_is_what_the_traces_say():
    model, batch = model_of(5, 8, TopK(2)), batch_of(3, 10, padding=4)
    layers = look(model, batch, jax.random.key(0))
    traces = jax.jit(lambda m, b: run(m, b).aux.traces)(model, batch)
    assert [layer.path for layer in layers] == ["body/unit/0/layer", "body/unit/1/layer"]
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(layer.choices, traces["body/unit/layer/choices"][i])
        assert (layer.choices[-1, 6:] == -1).all() and (layer.choices[:, :6] >= 0).all()
        counts = np.bincount(layer.choices[layer.choices >= 0], minlength=5)
        np.testing.assert_allclose(layer.load, counts / counts.sum(), rtol=1e-6)
        assert layer.entropy == pytest.approx(float(traces["body/unit/layer/entropy"][i]), rel=1e-5)
        assert layer.dropped is None and layer.lost is None


@pytest.mark.parametrize("rows", [1, 2])
def test_what_a_capacity_drops_is_seen_though_rows_share_it(rows):
    model, batch = model_of(4, 8, TopK(1), capacity=Capacity(0.5, rows=2)), batch_of(rows, 16)
    layers = look(model, batch, jax.random.key(0))
    for layer in layers:
        assert layer.choices.shape == (rows, 16, 1)
        assert layer.dropped >= 0.5 - 1e-6  # there is room for half of the choices
        if layer.lost is not None:
            assert layer.lost.sum() == pytest.approx(layer.dropped * rows * 16)


def test_an_encoder_has_read_the_first_half_and_the_decoder_the_rest():
    experts = Residual(MoE(4, 8, TopK(2)))
    config = EncoderDecoder(32, 8, experts, encoder=experts)
    layers = look(jax.jit(lambda: config.build(nnx.Rngs(0)))(), batch_of(2, 12), jax.random.key(0))
    assert [layer.path.split("/")[0] for layer in layers] == ["encoder", "body"]
    seen = [(layer.choices >= 0).all(-1).all(0).tolist() for layer in layers]
    assert seen == [[True] * 6 + [False] * 6, [False] * 6 + [True] * 6]


def test_a_model_without_experts_is_told_what_would_be_right():
    model = LanguageModel(32, 8, Residual(SwiGLU(8))).build(nnx.Rngs(0))
    with pytest.raises(ValueError, match="no layer with experts.*mixture-of-experts-tiny"):
        look(model, batch_of(1, 8), jax.random.key(0))


class Reader(HTMLParser):
    """Elements must be closed in order; keeps tags, attributes and words."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page():
    """Two layers of other sizes, with all there is to say; a third that did not see every token."""
    rng, real = np.random.default_rng(0), np.ones((2, 4), bool)
    real[1, 3] = False
    layers = []
    for i, (E, k) in enumerate([(4, 2), (20, 3)]):
        choices = np.where(real[..., None], rng.integers(0, E, (2, 4, k)), -1)
        layers.append(ExpertLayer(f"body/{i}", np.full(E, 1 / E), 1.0, 1.2, 0.5, 3.0, choices,
                                  np.full(choices.shape, 0.3125), 0.25, (choices % 2).sum(-1) * real))
    layers.append(ExpertLayer("body/2", np.full(4, 0.25), 1.0, 1.2, 0.5, 3.0, None))
    record = [{"step": 5 * s, "load": {"body/0": [0.7, 0.1, 0.1, 0.1]}} for s in range(1, 30)]
    record.insert(9, {"step": 48, "collapse": {"layer": 1, "path": "body/0", "experts": [3], "since": 1, "steps": 48}})
    pieces = [b"def", b" f", HOSTILE, b"\n", b"\xff", b"", b" 42"]
    text = expert_page("Experts of <x>", layers, pieces, real, record, {"text": HOSTILE.decode()}).html()
    page = Reader(text)
    assert page.tags.count("script") == 3 and not {"img", "link", "iframe"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")] and "http" not in text
    assert sum(HOSTILE.decode() in words for words in page.words) == 2
    assert page.tags.count("option") == 2 and "Load over training" in text and text.count("Chosen together") == 2
    assert "Experts that collapsed" in text and ">48</td>" in text

    data = json.loads(re.search(r'id="routing">(.*?)</script>', text).group(1))
    for layer, said in zip(layers, data["layers"]):
        assert said["experts"] == len(layer.load) and said["k"] == layer.choices.shape[-1]
        assert said["choices"] == layer.choices[real].reshape(-1).tolist()
        assert said["lost"] == layer.lost[real].tolist() and set(said["weights"]) == {0.312}
    tokens = text[text.index('<div class="tokens routed">'):text.index('<script type="application/json"')]
    assert tokens.count("<span>") == 7 and tokens.index("<i></i>") > tokens.index("↵")  # the second row's first token
