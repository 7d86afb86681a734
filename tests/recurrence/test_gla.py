"""Gated linear attention against a slow float64 loop written from the paper, its sizes and errors."""

import numpy as np
import pytest
from flax import nnx

from archlab.layers.alphabet import parameters_of
from archlab.layers.contract import Place
from archlab.recurrence.forms import Chunked
from archlab.recurrence.gla import GatedLinearAttention
from tests.recurrence.against import check, rms, sigmoid, silu


def reference(temperature):
    def layer(w, x):
        """arXiv:2312.06635, equation 3 and section 4.4."""
        out = np.zeros_like(x)
        _, H, N = w["key"].shape
        for h in range(H):
            S = np.zeros((N, w["value"].shape[2]))
            for t, x_t in enumerate(x):
                logit = x_t @ w["forget_down"] @ w["forget_up"][:, h] + w["forget_bias"][h]
                S = sigmoid(logit)[:, None] ** (1 / temperature) * S
                S = S + np.outer(x_t @ w["key"][:, h], x_t @ w["value"][:, h])
                y = rms(x_t @ w["query"][:, h] @ S / np.sqrt(N)) * w["norm/scale"]
                out[t] += (y * silu(x_t @ w["gate"][:, h])) @ w["out"][h]
        return out

    return layer


@pytest.mark.parametrize("config", [GatedLinearAttention(2, rank=3),
                                    GatedLinearAttention(1, 3, 5, temperature=0.5, form=Chunked(4))],
                         ids=["plain", "strong-decay"])
def test_gla_is_the_papers(float64, config):
    check(config, reference(config.temperature))


def test_sizes():
    p = parameters_of(GatedLinearAttention(4).build(nnx.Rngs(0), Place(64)))
    assert p["key"].shape == (64, 4, 8) and p["value"].shape == (64, 4, 16)
    assert sum(q.size for q in p.values()) == 4 * 64**2 + 16 * (64 + 32) + 32 + 16  # section 4.4: 4 D^2 and a little
    assert {path for path, parameter in p.items() if not parameter.decay} == {"forget_bias", "norm/scale"}


def test_errors():
    with pytest.raises(ValueError, match="GatedLinearAttention.key_size = None: the width 12"):
        GatedLinearAttention(4).check(12)
    with pytest.raises(ValueError, match="GatedLinearAttention.temperature = 0"):
        GatedLinearAttention(4, temperature=0)
