"""Noisy top-k gating against Shazeer's equations, one token and one expert at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.experts.balance import LoadLoss
from archlab.experts.moe import MoE
from archlab.experts.noisy import NoisyTopK, chances
from archlab.layers.contract import Place, Training
from tests.helpers import cast, jittered, tokens_of

D, E, K = 6, 5, 2
TRAINING = Training(jax.random.key(3), jnp.int32(0))


def router():
    return jittered(cast(NoisyTopK(K).build(nnx.Rngs(0), Place(D), E, 1.0), jnp.float64), size=0.7)


def slow(clean, noisy, spread):
    """Equations 3, 5, 8 and 9 as they stand, for one token: gates, weights by expert, chances."""
    kth = lambda values: sorted(values, reverse=True)[K - 1]
    kept = [h if h >= kth(noisy) else -math.inf for h in noisy]
    weights = np.exp(kept) / np.exp(kept).sum()
    normal = lambda z: (1 + math.erf(z / math.sqrt(2))) / 2
    others = [[h for j, h in enumerate(noisy) if j != i] for i in range(E)]
    return weights, [normal((clean[i] - kth(others[i])) / spread[i]) for i in range(E)]


def test_against_the_equations(float64):
    module, x = router(), jax.random.normal(jax.random.key(1), (2, 7, D))
    routing = jax.jit(lambda m, x: m(x, tokens_of(np.ones((2, 7)), TRAINING)))(module, x)
    clean = np.asarray(x) @ np.asarray(module.weight[...])
    spread = np.log1p(np.exp(np.asarray(x) @ np.asarray(module.noise[...])))
    for place in np.ndindex(2, 7):
        weights, likely = slow(clean[place], np.asarray(routing.logits)[place], spread[place])
        got = np.zeros(E)
        got[np.asarray(routing.experts)[place]] = np.asarray(routing.weights)[place]
        np.testing.assert_allclose(got, weights, rtol=1e-9)
        np.testing.assert_allclose(routing.chances[place], likely, rtol=1e-7, atol=1e-12)
    drawn = (np.asarray(routing.logits) - clean) / spread
    assert abs(drawn.mean()) < 0.4 and 0.7 < drawn.std() < 1.3


def test_chances_are_frequencies(float64):
    """Expert i's noise drawn again a hundred thousand times, the others' left as it is."""
    draw = np.random.default_rng(0)
    clean, spread = draw.normal(size=E), np.exp(draw.normal(size=E))
    noisy = clean + spread * draw.normal(size=E)
    likely = chances(*(jnp.asarray(a)[None, None] for a in (clean, noisy, spread)), K)[0, 0]
    for i in range(E):
        again = clean[i] + spread[i] * draw.normal(size=100_000)
        passed = sum((again < noisy[j]).astype(int) for j in range(E) if j != i) < K
        np.testing.assert_allclose(passed.mean(), likely[i], atol=0.01)


def test_zeros_at_first_and_no_noise_without_training():
    module = NoisyTopK(K).build(nnx.Rngs(0), Place(D), E, 1.0)
    x = jax.random.normal(jax.random.key(1), (4, 50, D))
    run = jax.jit(lambda training=None: module(x, tokens_of(np.ones((4, 50)), training)))
    noisy, plain = run(TRAINING), run()
    assert (plain.logits == 0).all() and plain.chances is None
    assert len(np.unique(noisy.experts)) == E
    np.testing.assert_allclose(noisy.logits.std(), np.log(2), rtol=0.1)  # softplus(0)


def test_the_load_loss_has_a_gradient():
    """All tokens like one expert: the gradient of LoadLoss lowers that expert's clean logit."""
    module = MoE(E, 4, NoisyTopK(K), balance=(LoadLoss(),)).build(nnx.Rngs(0), Place(D))
    module.router.weight = module.router.weight.replace(module.router.weight[...].at[0, 3].set(2.0))
    x, tokens = jnp.ones((2, 9, D)), tokens_of(np.ones((2, 9)), TRAINING)
    grad = jax.jit(jax.grad(lambda m: m(x, tokens)[2].losses["load"]))(module).router.weight[...]
    assert (grad[:, 3] > 0).all() and np.isfinite(grad).all()


@pytest.mark.parametrize("k, experts, named", [(1, 4, "NoisyTopK.k = 1"), (4, 4, "k = 4: .* number of experts, 4")])
def test_bad_k(k, experts, named):
    with pytest.raises(ValueError, match=named):
        MoE(experts, 8, NoisyTopK(k))
