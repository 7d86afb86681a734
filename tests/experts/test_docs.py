"""What docs/experts.md says is built: every expression of its table, and its own router."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.layers.contract import Place
from tests.helpers import tokens_of

DOCS = (Path(__file__).parents[2] / "docs" / "experts.md").read_text()
IMPORTS, OWN = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
ROWS = re.findall(r"^\| .* \| `((?:MoE|Parallel)\(.*\))` \| .* \|$", DOCS, re.MULTILINE)


def test_there_are_rows():
    assert len(ROWS) >= 15


@pytest.mark.parametrize("expression", [*ROWS, "MoE(8, 12, Cosine(2))"])
def test_expression(expression):
    names = {}
    exec(IMPORTS + OWN, names)
    layer = eval(expression, names).build(nnx.Rngs(0), Place(8))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 8)), jnp.float32)
    assert np.isfinite(layer(x, tokens_of(np.ones((1, 3))))[0]).all()
