"""Config trees: validation at construction, paths, JSON, errors that name field and value."""

import dataclasses

import pytest

import archlab
from archlab.attention.attention import Attention
from archlab.attention.positions import Rotary
from archlab.experts.mixture_of_routers import MixtureOfRouters
from archlab.layers.config import Config, from_json
from archlab.layers.mlp import MLP, SwiGLU
from archlab.layers.norms import LayerNorm, RMSNorm
from archlab.layers.repeat import Repeat, Shared
from archlab.layers.residual import Residual
from archlab.layers.sequence import Parallel, Sequence
from archlab.model import LanguageModel
from archlab.recurrence.forms import Chunked
from archlab.recurrence.mamba import Mamba
from archlab.recurrence.mamba2 import Mamba2


@pytest.mark.parametrize("make, words", [
    (lambda: LanguageModel(256, 30, Attention(4)), ["Attention.heads = 4", "30"]),
    (lambda: LanguageModel(256, 12, Attention(4)), ["even"]),
    (lambda: LanguageModel(0, 32, Attention(4)), ["LanguageModel.vocab = 0"]),
    (lambda: LanguageModel(256, 32, Attention(4), dtype="bfloat"), ["dtype = 'bfloat'", "bfloat16"]),
    (lambda: Attention(0), ["heads = 0"]),
    (lambda: Attention(4, kv_heads=3), ["kv_heads = 3", "heads = 4"]),
    (lambda: Attention(4, window=0), ["window = 0", "at least 1"]),
    (lambda: Rotary(base=0.5), ["base = 0.5"]),
    (lambda: MLP(0), ["hidden = 0"]),
    (lambda: MLP(8, activation="gelo"), ["gelo", "did you mean gelu"]),
    (lambda: RMSNorm(eps=0), ["eps = 0"]),
    (lambda: Residual(MLP(8), dropout=1.0), ["dropout = 1.0"]),
    (lambda: Repeat(MLP(8), 0), ["n = 0"]),
    (lambda: Shared(MLP(8), lora=-1), ["lora = -1"]),
    (lambda: Sequence(MLP(8), "mlp"), ["layers"]),
    (lambda: Parallel(MLP(8), combine="add"), ["combine = 'add'"]),
    (lambda: Mamba(state=0), ["state = 0"]),
    (lambda: Mamba2(step_limits=(1.0,)), ["Mamba2.step_limits = (1.0,)", "a tuple (a number, a number) or None"]),
    (lambda: Mamba2(step_limits=("a", 2.0)), ["Mamba2.step_limits = ('a', 2.0)", "a tuple (a number, a number)"]),
    (lambda: MixtureOfRouters(stages=(4, 2.5)), ["stages = (4, 2.5)", "must be a tuple (a whole number, ...)"]),
    (lambda: archlab.get_config("transfomer-tiny"), ["did you mean transformer-tiny"]),
])
def test_bad_values_are_named(make, words):
    with pytest.raises(ValueError) as error:
        make()
    for word in words:
        assert word in str(error.value)


def test_set_by_path():
    config = archlab.get_config("transformer-nano")
    changed = config.set("body.unit.layers.1.layer.hidden", "48").set("body.n", 3)
    assert changed.body.unit.layers[1].layer == SwiGLU(48) and changed.body.n == 3
    assert config.body.n == 2  # the original is as it was
    with pytest.raises(ValueError, match="no field 'hiden'; did you mean hidden"):
        config.set("body.unit.layers.1.layer.hiden", 48)
    with pytest.raises(ValueError, match="places 0 to 1"):
        config.set("body.unit.layers.2.layer", 48)
    with pytest.raises(ValueError, match="Attention.kv_heads = 2: must divide heads = 5"):
        config.set("body.unit.layers.0.layer.heads", 5)


def test_a_whole_number_in_a_tuple_is_a_number():
    assert Mamba2(step_limits=(0, 2)).step_limits == (0, 2)


@pytest.mark.parametrize("text, words", [
    ("Chunked(sizes=3)", "Chunked has no field 'sizes'; did you mean size?"),
    ("Chunked(3, 4)", "Chunked: too many positional arguments; its fields are size"),
    ("Chunked(3, size=4)", "Chunked: multiple values for argument 'size'"),
    ("MLP()", "MLP: missing a required argument: 'hidden'; its fields are hidden, "),
    ("Sequential(size=3)", "Sequential has no field 'size'; there are none"),
])
def test_a_config_in_a_text_is_checked_as_any_other(text, words):
    config = LanguageModel(64, 16, Mamba())
    with pytest.raises(ValueError) as error:
        config.set("body.form", text)
    assert words in str(error.value)
    assert config.set("body.form", "Chunked(3)").body.form == Chunked(3)


def test_json_keeps_everything_and_runs_nothing():
    config = LanguageModel(64, 16, Repeat(Parallel(Attention(2, window=3), Mamba(), combine="gate"), 2),
                           norm=LayerNorm(bias=False), tied=False, dtype="bfloat16")
    assert from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="no config class named 'os.system'"):
        from_json('{"type": "os.system", "command": "true"}')
    with pytest.raises(ValueError, match="MLP has no field"):
        from_json('{"type": "MLP", "hidden": 4, "depth": 3}')
    with pytest.raises(ValueError, match="MLP: missing a required argument: 'hidden'"):
        from_json('{"type": "MLP"}')


def test_a_number_stays_a_number():
    with pytest.raises(ValueError, match="MLP.hidden = 'abc': must be a number"):
        MLP(8).set("hidden", "abc")


def test_names_of_configs_are_not_taken_twice():
    with pytest.raises(ValueError, match="named MLP exists already, in archlab.layers.mlp"):
        type("MLP", (Config,), {"__module__": "elsewhere"})


def test_subclass_is_frozen_and_printable():
    class Toy(Config):
        size: int = 3

    assert repr(Toy()).endswith("Toy(size=3)")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Toy().size = 4
    assert hash(Toy()) == hash(Toy(3))
