"""Every fixture, found by itself, held to what transformers computed; and what is said about checkpoints gone wrong."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import archlab
from archlab import hub
from archlab.experts import moe
from archlab.hub.family import all_families, describe, each, family_of, known_layers
from archlab.hub.rwkv import ARCHITECTURE as OFFICIAL_RWKV
from archlab.layers.config import LayerConfig
from archlab.layers.mlp import MLP
from archlab.layers.residual import Residual
from archlab.layers.weights import merge, split
from archlab.model import LanguageModel
from archlab.recurrence.rg_lru import RGLRU
from tests.helpers import build

FIXTURES = Path(__file__).parent / "fixtures"
LLAMA = FIXTURES / "llama"


def model_type(name: str) -> str:
    return json.loads((FIXTURES / name / "config.json").read_text())["model_type"]


NAMES = sorted(folder.name for folder in FIXTURES.iterdir())
# Tests of one checkpoint run one after another in one process, which loads it once.
CHECKPOINTS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in NAMES]


def stored(name: str) -> set[str]:
    """The names of what is expected of a checkpoint."""
    with safe_open(FIXTURES / name / "expected.safetensors", "np") as file:
        return set(file.keys())


@functools.lru_cache(maxsize=1)
def loaded(name: str):
    """The model in float32, what is expected of it, and its compiled forward pass."""
    model = archlab.load(FIXTURES / name, dtype="float32")
    structure, *arrays = split(model)
    expected = load_file(FIXTURES / name / "expected.safetensors")

    @jax.jit
    def forward(arrays, ids):
        model = merge(structure, *arrays)
        memory = model.encode(expected["source"], expected["source_mask"])[0] if "source" in expected else None
        return model(ids, memory=memory).logits

    return model, expected, lambda ids: np.asarray(forward(arrays, ids))


def test_every_fixture_has_a_family():
    assert {model_type(name) for name in NAMES} <= set(all_families())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits(name):
    _, expected, forward = loaded(name)
    for ids, logits in (("ids", "logits"), ("ids_long", "logits_long")):
        if ids in expected:
            error = np.abs(forward(expected[ids]) - expected[logits]).max()
            assert error < 1e-4, (ids, error)


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if "chosen" in stored(name.values[0])])
def test_routers_decide_alike(name, monkeypatch):
    """Router logits, the chosen experts and their weights, layer by layer; experts are compared as sets."""
    monkeypatch.setattr(moe, "routing_traces", lambda routing, real: {
        "logits": routing.logits, "experts": routing.experts, "weights": routing.weights})
    model, expected, _ = loaded(name)
    memory = None
    if "source" in expected:
        memory, aux = model.encode(expected["source"], expected["source_mask"])
        compare_routing(aux, expected, "source_", expected["source_mask"] == 1)
    compare_routing(model(expected["ids"], memory=memory).aux, expected)


def compare_routing(aux, expected, prefix="", real=...):
    """The decisions of all layers of one side, at real tokens [B, T] (all of them where it is not said)."""
    found = in_layers(aux.traces)
    logits, experts, weights = (found[name][:, real] for name in ("logits", "experts", "weights"))
    theirs = {name: expected[prefix + name][:, real] for name in ("router_logits", "chosen", "chosen_weights")}
    np.testing.assert_allclose(logits, theirs["router_logits"], atol=1e-4)
    order = np.argsort(experts, -1)
    np.testing.assert_array_equal(np.take_along_axis(experts, order, -1), theirs["chosen"])
    np.testing.assert_allclose(np.take_along_axis(weights, order, -1), theirs["chosen_weights"], atol=1e-4)


def in_layers(traces) -> dict:
    """Traces by their last name, [layers, ...], in the order in which layers run: copies of a unit follow one another,
    and children of a body one another."""
    found = {}
    for path, value in traces.items():
        names = path.split("/")
        child = int(names[names.index("layers") + 1])
        places = [int(n) for n in names[names.index("layers") + 2 :] if n.isdigit()]
        copies = np.asarray(value) if "unit" in names else np.asarray(value)[None]
        found.setdefault(names[-1], []).extend(((child, copy, places), one) for copy, one in enumerate(copies))
    return {name: np.stack([one for _, one in sorted(pairs, key=lambda p: p[0])]) for name, pairs in found.items()}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_text(name):
    model, expected, forward = loaded(name)
    if "ids_long" in expected or "source" in expected:
        # The longest text here is short of where frequencies change, and a cache declares more: so one pass over the
        # whole text, in which every choice shows.
        start = expected["ids"][:, :1 if "source" in expected else 8]
        text = np.concatenate([start, expected["greedy"]], axis=1)[:, :-1]
        said = forward(text)[:, start.shape[1] - 1:].argmax(-1)
        np.testing.assert_array_equal(said, expected["greedy"])
    else:
        text = archlab.generate(model, expected["ids"][:, :8], expected["greedy"].shape[1], temperature=0)
        np.testing.assert_array_equal(text[:, 8:], expected["greedy"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_older_spelling(name):
    older = FIXTURES / name / "config.older.json"
    if older.is_file():
        values = json.loads(older.read_text())
        assert family_of(values["model_type"]).config(values) == archlab.load(FIXTURES / name).config


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_export_and_load_again(name, tmp_path):
    model = archlab.load(FIXTURES / name)
    archlab.save(model, tmp_path, format="huggingface")
    again = archlab.load(tmp_path)
    assert again.config == model.config
    before, after = split(model)[1], split(again)[1]
    assert set(before) == set(after)
    for path, array in before.items():
        assert array.dtype == after[path].dtype
        np.testing.assert_array_equal(array, after[path], err_msg=path)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_reads_what_is_exported(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model, expected, _ = loaded(name)
    archlab.save(model, tmp_path, format="huggingface")
    given = {key: torch.tensor(value) for key, value in expected.items()}
    if "source" in expected:
        kind = transformers.AutoModelForSeq2SeqLM
        inputs = {"input_ids": given["source"], "attention_mask": given["source_mask"],
                  "decoder_input_ids": given["ids"]}
    else:
        kind, inputs = transformers.AutoModelForCausalLM, {"input_ids": given["ids"]}
    attention = "sdpa" if name == "falcon-alibi" else "eager"  # its eager form adds the bias twice
    theirs, said = kind.from_pretrained(tmp_path, attn_implementation=attention, experts_implementation="eager",
                                        output_loading_info=True)  # its grouped products want sizes that divide by 4
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    with torch.no_grad():
        logits = theirs.float().eval()(**inputs, use_cache=False).logits.numpy()
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)


def test_a_loaded_model_is_trained_and_exported(tmp_path):
    model, expected, _ = loaded("llama")
    structure, params, rest = split(model)
    ids = jnp.asarray(expected["ids"])

    def loss(params):
        model = merge(structure, params, rest)
        return model.losses(model(ids, logits="none").hidden[:, :-1], ids[:, 1:]).mean()

    before, grads = jax.jit(jax.value_and_grad(loss))(params)
    trained = merge(structure, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), rest)
    archlab.save(trained, tmp_path, format="huggingface")
    assert jax.jit(loss)(split(archlab.load(tmp_path))[1]) < before - 0.1


def test_a_model_of_the_zoo_is_exported(tmp_path):
    model = build(archlab.get_config("transformer-nano"))  # its Repeat holds a block, not a Sequence of one
    archlab.save(model, tmp_path, format="huggingface")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    forward, ids = jax.jit(lambda model, ids: model(ids).logits), jnp.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(forward(archlab.load(tmp_path), ids), forward(model, ids))


def test_what_no_family_has_is_not_exported(tmp_path):
    config = archlab.get_config("transformer-nano").set("body.unit.layers.0.layer.window", 3).set("logit_cap", 7.5)
    config = config.set("body.unit.layers.1.layer.activation", "relu2").set("body.unit.layers.1.scale", 0.25)
    with pytest.raises(ValueError, match="(?s)nearest is .*0.25"):
        archlab.save(build(config), tmp_path / "out", format="huggingface")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="did you mean huggingface"):
        archlab.save(build(config), tmp_path / "out", format="hugingface")


@pytest.mark.parametrize("name, layers", [("gla-nano", "GatedLinearAttention"), ("hgrn2-nano", "HGRN2, LowerBounds"),
                                          ("minimax-nano", "LightningAttention")])
def test_layers_that_no_family_knows_are_named(name, layers):
    with pytest.raises(ValueError, match=f"no family .* has this architecture: none knows {layers}$"):
        describe(archlab.get_config(name))


def test_a_model_of_known_layers_in_no_known_order():
    with pytest.raises(ValueError, match="no family .* has this architecture: a model made so of RGLRU, RMSNorm"):
        describe(LanguageModel(64, 16, Residual(RGLRU(2))))


def test_layers_of_all_checkpoints_are_known():
    for name in NAMES:
        values = json.loads((FIXTURES / name / "config.json").read_text())
        layers = {type(part) for _, part in family_of(values["model_type"]).config(values).walk()
                  if isinstance(part, LayerConfig)}
        assert layers <= known_layers(), name


def test_a_family_and_fields_that_compute_nothing_are_chosen_by_the_caller(tmp_path):
    model = archlab.load(LLAMA)
    hub.save(model, tmp_path, {"eos_token_id": 7, "model_type": "llama", "max_position_embeddings": 99})
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["eos_token_id"], values["model_type"], values["max_position_embeddings"]) == (7, "llama", 99)
    with pytest.raises(ValueError, match=r"fields = \['hidden_size'\]"):
        hub.save(model, tmp_path, {"hidden_size": 7})
    with pytest.raises(ValueError, match="no checkpoint of gpt2 has .* of Attention, MLP, "):
        hub.save(model, tmp_path, {"model_type": "gpt2"})


def changed(folder: Path, fields: dict = {}, tensors: dict = {}) -> Path:
    """A copy of the llama fixture, with other fields and tensors; None leaves one out."""
    shutil.copytree(LLAMA, folder)
    change = lambda old, new: {key: value for key, value in (old | new).items() if value is not None}
    values = change(json.loads((folder / "config.json").read_text()), fields)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(change(load_file(folder / "model.safetensors"), tensors), folder / "model.safetensors")
    return folder


def test_all_that_is_wrong_with_fields_is_listed(tmp_path):
    folder = changed(tmp_path / "a", {
        "hidden_act": "quick_gelu", "new_trick": 3, "attention_bias": "yes", "rms_norm_eps": True,
        "rope_parameters": {"rope_type": "spiral", "rope_theta": 500.0, "arms": 2}})
    with pytest.raises(ValueError) as error:
        archlab.load(folder)
    for words in ("hidden_act = 'quick_gelu' is not supported", "new_trick = 3 is not understood",
                  "attention_bias = 'yes'", "rms_norm_eps = True", "rope_parameters.rope_type = 'spiral'",
                  "rope_parameters.arms = 2"):
        assert words in str(error.value)


def test_a_whole_number_may_be_written_with_a_point(tmp_path):
    model = archlab.load(changed(tmp_path / "a", {"vocab_size": 64.0, "rms_norm_eps": 1}))
    assert isinstance(model.config.vocab, int) and model.config.norm.eps == 1.0
    with pytest.raises(ValueError, match="vocab_size = 64.5"):
        archlab.load(changed(tmp_path / "b", {"vocab_size": 64.5}))


def test_a_field_that_must_be_positive_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"MLP.hidden = -4: .*the reading ended here: there may be more"):
        archlab.load(changed(tmp_path / "a", {"intermediate_size": -4, "new_trick": 3}))


def test_all_that_is_wrong_with_tensors_is_listed(tmp_path):
    folder = changed(tmp_path / "a", tensors={
        "model.norm.weight": None, "model.layers.0.mlp.up_proj.weight": np.ones((3, 4), np.float32),
        "model.layers.1.self_attn.q_proj.bias": np.ones(32, np.float32),
        "model.layers.0.self_attn.k_proj.weight": np.ones((16, 32), np.int8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})  # a buffer, which is no error
    with pytest.raises(ValueError) as error:
        archlab.load(folder)
    lines = str(error.value).splitlines()[1:]
    hidden = json.loads((LLAMA / "config.json").read_text())["intermediate_size"]
    assert sorted(line.strip() for line in lines) == [
        "missing: model.norm.weight [32]", f"model.layers.0.mlp.up_proj.weight is [3, 4], must be [{hidden}, 32]",
        "model.layers.0.self_attn.k_proj.weight holds I8, which are no floating-point numbers that can be read",
        "not expected: model.layers.1.self_attn.q_proj.bias [32]"]


def test_an_unknown_family_is_met_with_near_names(tmp_path):
    with pytest.raises(ValueError, match="model_type = 'llamma'.*did you mean llama"):
        archlab.load(changed(tmp_path / "a", {"model_type": "llamma"}))


def test_a_tied_head_that_is_stored_once_more(tmp_path):
    table = load_file(LLAMA / "model.safetensors")["model.embed_tokens.weight"]
    same = archlab.load(changed(tmp_path / "a", {"tie_word_embeddings": True}, {"lm_head.weight": table}))
    assert same.config.tied and same.head is None
    other = archlab.load(changed(tmp_path / "b", {"tie_word_embeddings": True}))  # transformers keeps both, too
    np.testing.assert_array_equal(other.head.weight, archlab.load(LLAMA).head.weight)


def test_names_without_the_prefix_of_the_base_model(tmp_path):
    tensors = load_file(LLAMA / "model.safetensors")
    bare = {name.removeprefix("model."): array for name, array in tensors.items()}
    model = archlab.load(changed(tmp_path / "a", tensors=dict.fromkeys(tensors) | bare))
    np.testing.assert_array_equal(model.embed.table, archlab.load(LLAMA).embed.table)


def test_defaults_are_those_of_transformers():
    """A config.json that says nothing is that of the config class."""
    transformers = pytest.importorskip("transformers")
    known = {model_type: family for model_type, family in all_families().items()
             if family.architecture != OFFICIAL_RWKV}  # which transformers does not know
    for model_type, family in known.items():
        theirs = transformers.AutoConfig.for_model(model_type)
        for name, default in family.defaults.items():
            value = getattr(theirs, family.spelling.get(name, name), getattr(theirs, name, default))
            assert default is None or value == default, (model_type, name, default, value)


def test_each_counts_copies():
    config = archlab.load(LLAMA).config
    assert each(config, MLP) == [each(config, MLP)[0]] * 2
