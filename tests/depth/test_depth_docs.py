"""What docs/depth.md says is built and runs; and routing over depth composes with any mixer and any feed-forward."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.attention.latent import LatentAttention
from archlab.depth.coordinates import Coordinates
from archlab.depth.depth_choice import DepthChoice
from archlab.depth.halting import ACT
from archlab.depth.mixture_of_depths import MixtureOfDepths
from archlab.depth.mixture_of_recursions import MixtureOfRecursions
from archlab.depth.own import LowRank, Own
from archlab.depth.recur import Recur
from archlab.experts.moe import MoE
from archlab.layers.contract import Place, Training
from archlab.layers.norms import RMSNorm
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.recurrence.gated_delta_net import GatedDeltaNet
from archlab.recurrence.mamba2 import Mamba2
from tests.helpers import cast, in_pieces, jittered, tokens_of

DOCS = (Path(__file__).parents[2] / "docs" / "depth.md").read_text()
IMPORTS, ROUTER, _ = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
TABLE = DOCS.split("## What there is")[1].split("## ")[0]
COLUMN = re.findall(r"^\| [^|]* \| ([^|]*) \|", TABLE, re.MULTILINE)
EXPRESSIONS = [expression for cell in COLUMN for expression in re.findall(r"`(.*?)`", cell)]
B, T, D = 2, 12, 16


def test_there_are_rows():
    assert len(EXPRESSIONS) >= 20


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression(expression):
    names = {}
    exec(IMPORTS, names)
    config = eval(expression, names)
    tokens = tokens_of(np.ones((B, T)), Training(jax.random.key(0), jnp.int32(0)))

    def run(x):
        y, _, aux = config.build(nnx.Rngs(0), Place(D, 0, config.branches))(x, tokens)
        return y, aux.loss()

    y, loss = jax.jit(run)(jax.random.normal(jax.random.key(1), (B, T, D)))
    assert np.isfinite(y).all() and np.isfinite(loss)


def test_router():
    names = {}
    exec(ROUTER, names)
    made = names["CONFIG"].build(nnx.Rngs(0), Place(D, 0, 1))
    depth = made(jnp.ones((1, T, D)), tokens_of(np.ones((1, T))))[2].traces["depth"]
    np.testing.assert_array_equal(depth[0], np.arange(T) % 2)


SPARSE = Sequence(Residual(Mamba2(4, 8)), Residual(MoE(3, 8)))


@pytest.mark.parametrize("config", [
    MixtureOfRecursions(SPARSE, 3, slack=0.3),
    MixtureOfRecursions(Sequence(Residual(LowRank(GatedDeltaNet(2), 2)), Residual(MoE(3, 8), Own(RMSNorm()))), 2,
                        (0.8, 0.5), DepthChoice()),
    MixtureOfRecursions(Sequence(Residual(LatentAttention(2, 6, 4, 4, 4)), Residual(MoE(3, 8))), 3, cache="shared"),
    MixtureOfDepths(Recur(SPARSE, 2, Coordinates(), ACT(bias=-1.0)), 0.6),
    Recur(MixtureOfDepths(MixtureOfRecursions(SPARSE, 2), 0.7), 2),
], ids=["mor-mamba2-moe", "mor-delta-own", "mor-latent-shared", "mod-universal", "recur-mod-mor"])
def test_composition(float64, config):
    """Two documents and padding, in one pass and in pieces through a state."""
    made = cast(jittered(config.build(nnx.Rngs(0), Place(D, 0, config.branches)), 1, 0.3), jnp.float64)
    x, segments = jax.random.normal(jax.random.key(2), (B, T, D), jnp.float64), np.repeat([[1, 2, 0]], [5, 6, 1], 1)
    tokens, real = tokens_of(segments.repeat(B, 0)), segments.repeat(B, 0) > 0
    run = jax.jit(lambda x, tokens, state: made(x, tokens, state))
    whole, _, aux = run(x, tokens, None)
    for cuts in ((3, 1, 5, 3), (1,) * T):
        through = in_pieces(run, made.init_state(B, T, jnp.float64), x, tokens, cuts)
        np.testing.assert_allclose(through[real], whole[real], rtol=1e-9, atol=1e-9)
    depths = [np.asarray(value) for name, value in aux.traces.items() if name.endswith(("depth", "steps"))]
    assert any(len(np.unique(depth)) > 1 for depth in depths)  # otherwise nothing was left out
