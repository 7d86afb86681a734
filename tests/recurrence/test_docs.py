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
from tests.helpers import build, cast, tokens_of

DOCS = (Path(__file__).parents[2] / "docs" / "recurrence.md").read_text()
IMPORTS, OWN = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
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


def test_own_mixer_keeps_the_laws_of_splits_and_documents(float64):
    """The docs' own mixer, all of it: readers will copy it."""
    names = {}
    exec(OWN, names)
    model = cast(build(names["CONFIG"]), jnp.float64)
    run = jax.jit(lambda ids, state=None, segments=None: model(ids, state, segment_ids=segments))
    ids = jax.random.randint(jax.random.key(0), (2, 20), 0, 256)
    segments = jnp.where(jnp.arange(20) < 9, 1, 2) * jnp.ones((2, 1), int)
    state, outs = model.init_state(2, 20), []
    for piece in (slice(0, 7), slice(7, 8), slice(8, 20)):
        out = run(ids[:, piece], state, segments[:, piece])
        state, outs = out.state, outs + [out.logits]
    packed = run(ids, None, segments).logits
    np.testing.assert_allclose(jnp.concatenate(outs, 1), packed, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(packed[:, 9:], run(ids[:, 9:]).logits, rtol=1e-9, atol=1e-9)
