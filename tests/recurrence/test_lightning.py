"""Lightning attention against a slow float64 loop written from the paper, and both rules for its slopes."""

import numpy as np
import pytest
from flax import nnx

from archlab.layers.alphabet import variables_of
from archlab.layers.contract import Place
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Sequence
from archlab.recurrence.forms import Chunked
from archlab.recurrence.lightning import GeometricSlopes, LightningAttention, LinearSlopes
from tests.recurrence.against import D, check, rms, sigmoid, silu


def reference(slopes):
    def layer(w, x):
        """arXiv:2501.08313, equations 6 to 8, with a decay."""
        _, H, K = w["key"].shape
        S, out = np.zeros((H, K, K)), np.zeros_like(x)
        for t, x_t in enumerate(x):
            q, k, v = (silu(np.einsum("d,dhk->hk", x_t, w[name])) for name in ("query", "key", "value"))
            for h in range(H):
                S[h] = np.exp(-slopes(h)) * S[h] + np.outer(k[h], v[h])
            y = rms(np.concatenate([q[h] @ S[h] for h in range(H)])) * w.get("norm/scale", 1)
            gate = sigmoid(np.einsum("d,dhk->hk", x_t, w["gate"]))
            out[t] = np.einsum("hk,hkd->d", gate * y.reshape(H, K), w["out"])
        return out

    return layer


@pytest.mark.parametrize("config, slopes", [
    (LightningAttention(2, 3, LinearSlopes(), form=Chunked(4)), lambda h: 8 * h / 2 * (1 - 3 / 4)),
    (LightningAttention(4, norm=RMSNorm(gain=False)), lambda h: 2 ** (-2 * (h + 1)) * (1 - 3 / (3 + 1e-5) + 1e-5)),
], ids=["linear", "geometric"])
def test_lightning_attention_is_the_papers(float64, config, slopes):
    check(config, reference(slopes), Place(D, 6, 8))


def test_slopes():
    np.testing.assert_allclose(GeometricSlopes().of(8, 0, 80), 0.5 ** np.arange(1, 9), rtol=2e-5)
    assert (GeometricSlopes().of(8, 79, 80) < 1e-5).all()
    np.testing.assert_allclose(LinearSlopes().of(4, 0, 4), [0, 2, 4, 6])
    np.testing.assert_allclose(LinearSlopes().of(4, 3, 4), [0, 0.5, 1, 1.5])


def test_each_layer_knows_its_number():
    block = Sequence(Residual(LightningAttention(4)), Residual(LightningAttention(2)))
    stacked = Repeat(block, 4).build(nnx.Rngs(0), Place(8, 0, 8))
    assert (variables_of(stacked)["unit/layers/0/layer/layer"][...][:, 0] == np.arange(4)).all()


def test_errors():
    with pytest.raises(ValueError, match="LightningAttention.heads = 5: must divide the width 8"):
        LightningAttention(5).check(8)
