"""Every router that is not `TopK`, inside a small language model, held to the laws of the contract.

In float64: a choice that flips on round-off would be no difference.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.attention.attention import Attention
from archlab.experts.balance import ImportanceLoss, LoadLoss, SwitchLoss, ZLoss
from archlab.experts.capacity import Capacity
from archlab.experts.gshard import SecondByChance
from archlab.experts.hierarchical import Hierarchical
from archlab.experts.mixture_of_routers import MixtureOfRouters
from archlab.experts.moe import MoE
from archlab.experts.noisy import NoisyTopK
from archlab.experts.sampled import RandomRouter, Reinforce, Sampled
from archlab.layers.config import from_json
from archlab.layers.contract import Training
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.model import LanguageModel
from archlab.training.reinforce import surrogate
from tests.helpers import build, cast

E, B, T = 6, 2, 14
CASES = {
    "noisy": dict(router=NoisyTopK(2), balance=(ImportanceLoss(), LoadLoss())),
    "gshard": dict(router=SecondByChance(), balance=(SwitchLoss(first=1),), capacity=Capacity(0.7, order="choice")),
    "sampled": dict(router=Sampled(2, Reinforce())),
    "random": dict(router=RandomRouter(2), capacity=Capacity(0.7, reroute=1)),
    "hierarchical": dict(router=Hierarchical(3), balance=(ZLoss(),), capacity=Capacity(0.7, reroute=1)),
    "mixture": dict(router=MixtureOfRouters((6, 4, 2), skip=True, price=0.1, reinforce=Reinforce()),
                    capacity=Capacity(0.7)),
}
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
IDS = jnp.asarray(np.random.default_rng(1).integers(0, 32, (B, T)))


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES], scope="module")
def experts(request):
    return Residual(MoE(E, 8, **CASES[request.param]))


def test_laws(float64, experts):
    """Splits, causality, packed documents and padding: rows of one length throughout, to compile few programs."""
    model = cast(build(LanguageModel(32, 16, Sequence(Residual(Attention(2)), experts))), jnp.float64)
    run = jax.jit(lambda ids, segments, state=None: model(ids, state, segment_ids=segments))
    one = np.ones((B, T), int)
    whole = run(IDS, one).logits

    state, outs = model.init_state(B, T), []
    for t in range(T):
        out = run(IDS[:, t : t + 1], one[:, t : t + 1], state)
        outs, state = [*outs, out.logits], out.state
    close(jnp.concatenate(outs, 1), whole)

    changed = run(IDS.at[:, 8:].set((IDS[:, 8:] + 7) % 32), one).logits
    close(changed[:, :8], whole[:, :8])
    assert not np.allclose(changed[:, 8:], whole[:, 8:])

    packed = run(IDS, np.repeat([[1, 2]] * B, [5, 9], axis=1)).logits
    close(packed[:, :5], whole[:, :5])
    alone = run(jnp.roll(IDS, -5, 1), np.repeat([[1, 0]] * B, [9, 5], axis=1)).logits  # and padding after it
    close(packed[:, 5:], alone[:, :9])

    real = one.copy()
    real[0, [0, 1, 5, 13]], real[1, [3, 4, 11, 12]] = 0, 0
    where = np.stack([np.flatnonzero(row) for row in real])
    ids = np.full(real.shape, 31)
    np.put_along_axis(ids, where, np.asarray(IDS[:, :10]), 1)
    close(np.take_along_axis(np.asarray(run(jnp.asarray(ids), real).logits), where[..., None], 1), whole[:, :10])


def test_training_form(experts):
    """Finite gradients with documents of one token and with padding; a bfloat16 stream is routed in float32."""
    segments = jnp.array([[1] * 7 + [2] + [3] * 6, [1] * 11 + [0] * 3])
    model = build(LanguageModel(32, 16, experts, dtype="bfloat16"))

    def loss(model):
        out = model(IDS, segment_ids=segments, training=Training(jax.random.key(0), jnp.int32(5)))
        nll = model.losses(out.hidden, IDS)
        drawn = surrogate(nll, (segments > 0) * 1.0, segments, out.aux.policies)
        return nll.mean() + out.aux.loss() + drawn, out.aux

    (value, said), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path((value, grads)):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
    assert {a.dtype for a in jax.tree.leaves((said.losses, said.policies, said.updates))} == {jnp.dtype("float32")}


def test_round_trip(experts):
    assert from_json(experts.to_json()) == experts
