"""Traces by layer bear the paths of the model taken apart, in the order in which the layers run."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from archlab.depth.recur import Recur
from archlab.experts.moe import MoE
from archlab.experts.routers import TopK
from archlab.layers.mlp import SwiGLU
from archlab.layers.repeat import Repeat, unstack
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.layers.traces import per_layer
from archlab.layers.weights import split
from archlab.model import LanguageModel

EXPERTS = Residual(MoE(4, 8, TopK(2, renormalise=True)))


def model_of(body):
    return nnx.eval_shape(lambda: LanguageModel(16, 8, body).build(nnx.Rngs(0)))


def traces_of(model):
    """The traces of a text of six tokens, by their names and shapes; the numbers are drawn."""
    shapes = jax.eval_shape(lambda m: m(jnp.arange(6)[None]).aux.traces, model)
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape.shape) for path, shape in shapes.items()}


def test_layers_before_within_and_after_nested_repeats():
    inner = Sequence(Repeat(Sequence(Residual(SwiGLU(8)), EXPERTS), 2), EXPERTS)
    model = model_of(Sequence(EXPERTS, Repeat(inner, 11, scan=False), EXPERTS))
    traces = traces_of(model)
    found = per_layer(traces, "load", 1)
    repeated = [f"body/layers/1/unit/{i}/layers/{rest}/layer" for i in range(11)
                for rest in ("0/unit/0/layers/1", "0/unit/1/layers/1", "1")]
    assert list(found) == ["body/layers/0/layer", *repeated, "body/layers/2/layer"]
    parameters = split(nnx.eval_shape(unstack, model))[1]
    assert all(f"{path}/up" in parameters for path in found)
    np.testing.assert_array_equal(found["body/layers/1/unit/7/layers/0/unit/1/layers/1/layer"],
                                  traces["body/layers/1/unit/layers/0/unit/layers/1/layer/load"][7, 1])
    assert list(per_layer(traces, "largest_logit", 0)) == list(found)
    assert all(value.shape == (1, 6, 2) for value in per_layer(traces, "choices", 3).values())


def test_steps_of_a_recurrence_and_a_unit_that_is_a_layer():
    traces = traces_of(model_of(Recur(EXPERTS, 3)))
    assert list(per_layer(traces, "load", 1)) == [f"body/unit/{step}/layer" for step in range(3)]


def test_an_encoder_comes_first_and_numbered_units_are_not_stacked():
    traces = {"body/unit/1/layer/load": np.ones(2), "body/unit/0/layer/load": np.ones(2),
              "encoder/unit/load": np.ones((2, 3)), "body/odd/load": np.ones((2, 3)), "body/unit/0/layer/depth": 1}
    assert list(per_layer(traces, "load", 1)) == ["encoder/unit/0", "encoder/unit/1", "body/odd/0", "body/odd/1",
                                                  "body/unit/0/layer", "body/unit/1/layer"]
