"""The three numbers: the leaky loss is that of the training form, the causal one that of evaluation, and the agreement
is what counting tokens by hand gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import archlab
from archlab.data import ByteTokenizer
from archlab.data.batches import Batch
from archlab.depth.mixture_of_depths import MixtureOfDepths
from archlab.depth.top_tokens import TopTokens
from archlab.layers.contract import Training
from archlab.layers.mlp import MLP
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.layers.weights import split
from archlab.model import LanguageModel
from archlab.training.evaluation import evaluate, make_evaluate_step
from archlab.training.look_ahead import LATE, look_ahead, make_look_ahead_step, without_dropout
from tests.helpers import build

ROOT = Path(__file__).parent.parent.parent
BYTES = ByteTokenizer().bytes_per_token


def batches(rows=2, T=24, count=2):
    """Rows of two documents each, the second of which ends in padding."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        ids, targets = rng.integers(0, 256, (2, rows, T)).astype(np.int32)
        segments = np.broadcast_to(np.where(np.arange(T) < T // 2, 1, np.where(np.arange(T) < T - 3, 2, 0)), (rows, T))
        yield Batch(ids, targets, segments.astype(np.int32), (segments > 0).astype(np.float32))


def depths_config(dropout: float = 0.0, **router) -> LanguageModel:
    """Mixture-of-Depths in every second of four blocks, half of the tokens each."""
    from archlab.attention.attention import Attention

    block = Sequence(Residual(Attention(2), dropout=dropout), Residual(MLP(32), dropout=dropout))
    routed = MixtureOfDepths(block, 0.5, TopTokens(gate="linear", **router))
    return LanguageModel(256, 16, Repeat(Sequence(block, routed), 2))


MODELS = {"mixture-of-recursions": lambda: archlab.get_config("mixture-of-recursions-nano"),
          "mixture-of-depths": lambda: depths_config(warmup=100)}


def both(model, batches):
    """The three numbers of a model."""
    return look_ahead(make_look_ahead_step(model.config, BYTES), *split(model)[1:], batches)


@pytest.mark.parametrize("name", MODELS)
def test_three_numbers_by_hand(name):
    model = build(MODELS[name]())
    structure, params, rest = split(model)
    found = both(model, batches())
    plain = evaluate(make_evaluate_step(structure, BYTES), params, rest, batches())
    assert found.causal.loss == pytest.approx(plain.loss, rel=1e-6)

    forward = jax.jit(lambda model, batch, form: model(batch.ids, segment_ids=batch.segments, training=form))
    nats = count = same = tokens = 0
    total = [0, 0]
    for batch in batches():
        passes = [forward(model, batch, form) for form in (Training(jax.random.key(0), jnp.int32(LATE)), None)]
        nats += float((model.losses(passes[0].hidden, batch.targets) * batch.weights).sum())
        count += batch.weights.sum()
        for row, t in zip(*np.nonzero(batch.segments)):
            deep = [[np.asarray(trace).reshape(-1, *batch.ids.shape)[:, row, t].tolist()
                     for path, trace in sorted(out.aux.traces.items()) if path.endswith("/depth")] for out in passes]
            same, tokens = same + (deep[0] == deep[1]), tokens + 1
            total = [a + np.sum(b) for a, b in zip(total, deep)]
    assert found.ahead.loss == pytest.approx(nats / count, rel=1e-5)
    assert abs(found.ahead.loss - found.causal.loss) > 1e-4  # the two routings are not the same
    assert 0 < same < tokens and found.agreement == pytest.approx(same / tokens)
    learned = [share for share in found.routers.values() if share < 1]  # of a first recursion for all there is no doubt
    assert len(learned) == 2 and min(learned) > 0
    np.testing.assert_allclose(np.sum(list(found.depths.values()), 0), np.array(total) / tokens, rtol=1e-5)
    assert f"{found.agreement:.2%}" in str(found) and json.loads(json.dumps(found.as_dict()))["routers"]


def test_dropout_is_left_out():
    """A model with dropout has the look-ahead loss of the same weights without."""
    model = build(depths_config(dropout=0.5))
    found = both(model, batches(count=1))
    quiet = nnx.merge(nnx.graphdef(build(depths_config())), nnx.state(model))
    assert found.ahead.loss == both(quiet, batches(count=1)).ahead.loss
    assert without_dropout(model.config) == quiet.config == depths_config()


def test_models_without_depth_and_without_look_ahead():
    """Experts that choose tokens have both losses and no depth to agree on; what never looks ahead has one loss."""
    from archlab.experts.expert_choice import ExpertChoice
    from archlab.experts.moe import MoE

    experts = LanguageModel(256, 16, Residual(MoE(4, 16, ExpertChoice(), balance=())))
    found = both(build(experts), batches(count=1))
    assert found.agreement is None and list(found.routers.values()) and "agree " not in str(found)
    assert found.ahead.loss != found.causal.loss
    with pytest.raises(ValueError, match="does not look ahead"):
        make_look_ahead_step(archlab.get_config("transformer-nano"), BYTES)


def test_training_and_evaluation_tell_them(tmp_path):
    """experiments.train leaves what experiments.evaluate prints, and the loss that counts is the causal one."""
    def run(program, *flags):
        done = subprocess.run([sys.executable, "-m", f"experiments.{program}", *flags], cwd=ROOT, text=True,
                              capture_output=True, timeout=600, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("train", "--model=mixture-of-recursions-nano", "--steps=2", "--batch=2", "--context=32", "--eval_batches=2",
        f"--out={tmp_path}")
    recorded = json.loads((tmp_path / "look_ahead.json").read_text())
    said = run("evaluate", f"--checkpoint={tmp_path}", "--batch=2", "--batches=2")
    told = json.loads(said.strip().split("\n")[-1])
    assert told["look_ahead"]["agreement"] == pytest.approx(recorded["agreement"])
    assert told["look_ahead"]["look_ahead_loss"] == pytest.approx(recorded["look_ahead_loss"], rel=1e-5)
    assert told["loss"] == pytest.approx(recorded["causal_loss"], rel=1e-5)
    assert "(leaky)" in said and "causal routing" in said
