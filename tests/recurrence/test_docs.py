"""What docs/recurrence.md says is built: every expression of its table."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from archlab.layers.contract import Place
from archlab.recurrence.hgrn2 import HGRN2, LowerBounds
from archlab.layers.sequence import Sequence
from tests.helpers import tokens_of

DOCS = (Path(__file__).parents[2] / "docs" / "recurrence.md").read_text()
IMPORTS = re.search(r"```python\n(.*?)```", DOCS, re.DOTALL).group(1)
TABLE = DOCS.split("## Mixers")[1].split("## ")[0]
COLUMN = re.findall(r"^\| [^|]* \| ([^|]*) \|", TABLE, re.MULTILINE)
EXPRESSIONS = [expression for cell in COLUMN for expression in re.findall(r"`(.*?)`", cell)]


def test_there_are_rows():
    assert len(EXPRESSIONS) >= 28


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression(expression):
    names = {}
    exec(IMPORTS, names)
    config = eval(expression, names | {"LowerBounds": LowerBounds})
    if isinstance(config, HGRN2 | LowerBounds):
        config = Sequence(LowerBounds(), HGRN2(2))

    def run(x):
        return config.build(nnx.Rngs(0), Place(16, 0, 2))(x, tokens_of(np.ones((1, 3))))[0]

    assert np.isfinite(jax.jit(run)(jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 16)), jnp.float32))).all()
