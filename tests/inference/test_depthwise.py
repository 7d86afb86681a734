"""Depth-wise batches: each request's text is what it would be alone, and no more is run than the depths ask for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import archlab
from archlab.attention.attention import Attention
from archlab.attention.latent import LatentAttention
from archlab.depth.depth_choice import DepthChoice
from archlab.depth.mixture_of_recursions import MixtureOfRecursions
from archlab.depth.own import Own
from archlab.depth.top_tokens import TopTokens
from archlab.experts.moe import MoE
from archlab.inference.admission import Request
from archlab.inference.depthwise import DepthwiseDecoder
from archlab.layers.mlp import SwiGLU
from archlab.layers.norms import RMSNorm
from archlab.layers.repeat import Repeat
from archlab.layers.residual import Residual
from archlab.layers.sequence import Identity, Provide, Sequence
from archlab.model import LanguageModel
from archlab.recurrence.mamba2 import Mamba2
from tests.helpers import build, cast

D = 16
ATTENTION, MLP = Residual(Attention(2, kv_heads=1)), Residual(SwiGLU(24))
BLOCK = Sequence(ATTENTION, MLP)
MAMBA = Residual(Mamba2(state=4, head_size=8))
PROMPTS = [(1, 5), (3, 11), (14, 6), (6, 1), (9, 8), (2, 14), (5, 9)]  # tokens of each prompt, and new ones


def mixture(unit=BLOCK, n=3, around=BLOCK, **fields):
    return LanguageModel(64, D, Sequence(around, MixtureOfRecursions(unit, n, **fields), around))


@functools.cache
def made(config):
    return cast(build(config), jnp.float64)  # round-off could flip a routing choice


@functools.cache
def decoder_of(config):
    return DepthwiseDecoder(made(config), 3, 32, 2, 2)


@functools.cache
def requests():
    rng = np.random.default_rng(0)
    return [Request(rng.integers(0, 64, prompt), new) for prompt, new in PROMPTS]


def decode(decoder, **settings):
    return sorted(decoder.run(requests(), **{"temperature": 0} | settings))


def check(config):
    """Against a whole pass over each text alone: its most likely tokens, and the depths that it says."""
    decoder = decoder_of(config)
    finished, total = decode(decoder), 0

    @jax.jit
    def whole(ids):
        out = made(config)(ids)
        return out.logits.argmax(-1)[0], next(v for path, v in out.aux.traces.items() if path.endswith("depth"))[0]

    for (index, tokens, depths), (prompt, new) in zip(finished, requests(), strict=True):
        assert len(tokens) == len(depths) == new
        text = np.concatenate([prompt, tokens])
        best, deep = whole(np.pad(text, (0, 32 - len(text)))[None])
        here = slice(len(prompt) - 1, len(text) - 1)
        np.testing.assert_array_equal(tokens, best[here], err_msg=f"request {index}")
        np.testing.assert_array_equal(depths, deep[here])
        total += depths.sum()
    assert decoder.work.unit_tokens == total  # no token is in the unit for nothing
    assert decoder.work.rest_tokens == sum(new + 1 for _, new in PROMPTS)  # each request's prompt enters once
    return np.concatenate([depths for _, _, depths in finished])


@pytest.mark.parametrize("cache", ["recursion", "shared"])
@pytest.mark.parametrize("router", [TopTokens(), DepthChoice()], ids=["top", "choice"])
def test_each_text_is_its_own(float64, router, cache):
    depths = check(mixture(router=router, cache=cache))
    assert set(depths) == {1, 2, 3}  # otherwise there was nothing to mix


@pytest.mark.parametrize("config", [
    mixture(Sequence(MAMBA, Residual(MoE(4, 12))), around=MAMBA),
    mixture(Sequence(Residual(LatentAttention(2, 6, 4, 4, 4)), MAMBA), capacities=(0.8, 0.8, 0.3), slack=0.2),
    mixture(Residual(Attention(2, window=5)), 3, Repeat(Residual(Attention(2, window=4)), 2), capacities=(1., 1., .5),
            router=TopTokens("tanh", "predictor", hidden=8)),
    LanguageModel(64, D, MixtureOfRecursions(Residual(LatentAttention(2, 6, 4, 4, 4)), 2, cache="shared",
                                             router=DepthChoice(score="sigmoid")), norm=None, embedding_scale=4.0),
], ids=["mamba-moe", "latent-hybrid", "windows", "alone-latent-shared"])
def test_any_unit(float64, config):
    assert len(set(check(config))) > 1


def test_the_schedule_changes_nothing(float64):
    """Drawn texts too: chance belongs to a request and a place in its text."""
    model = made(mixture(router=DepthChoice()))
    drawn = [decode(DepthwiseDecoder(model, rows, 32, *takes), temperature=0.9, top_k=20, rngs=nnx.Rngs(5))
             for rows, takes in [(1, (1, 1)), (9, (None, None))]]
    for one, *others in zip(*drawn, strict=True):
        for other in others:
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.depths, other.depths)
    assert len({tuple(text.tokens[:5]) for text in drawn[0]}) == len(PROMPTS)  # each by chance of its own


def test_rows_and_lanes_are_kept_busy():
    """While there is a queue every application is full, and shallow tokens do not wait for deep ones."""
    model, queue = build(mixture(router=DepthChoice())), [(request.prompt, 10) for request in requests() * 4]
    packed, lockstep = DepthwiseDecoder(model, 8, 32, 6, 3), DepthwiseDecoder(model, 8, 32, 8, 8)
    texts = [sorted(decoder.run(queue, temperature=1.0)) for decoder in (packed, lockstep)]
    assert 1 < np.concatenate([finished.depths for finished in texts[0]]).mean() < 2
    share = lambda work: (work.unit_tokens / (6 * work.unit_calls), work.rest_tokens / (3 * work.rest_calls))
    assert min(share(packed.work)) > 0.8  # the rest is how the last requests end
    assert packed.work.unit_calls * 6 < 0.8 * lockstep.work.unit_calls * 8
    assert lockstep.work.unit_tokens == np.concatenate([finished.depths for finished in texts[1]]).sum()


def test_requests_end_at_eos_and_free_their_row(float64):
    decoder = decoder_of(mixture())
    free = decode(decoder)
    eos = int(free[1].tokens[4])
    for plain, ended in zip(free, decode(decoder, eos=eos), strict=True):
        end = list(plain.tokens).index(eos) + 1 if eos in plain.tokens else len(plain.tokens)
        np.testing.assert_array_equal(ended.tokens, plain.tokens[:end])
        np.testing.assert_array_equal(ended.depths, plain.depths[:end])


def test_finished_texts_come_as_they_end(float64):
    decoder = decoder_of(mixture())
    order = [finished.index for finished in decoder.run(requests(), temperature=0)]
    assert sorted(order) == list(range(len(PROMPTS))) and order[0] == 0 and order != sorted(order)
    assert list(decoder.run([])) == []


def test_caches_are_those_of_the_model():
    """Side by side, the recursions' caches take the bytes that they take apart."""
    model = build(mixture())
    decoder = DepthwiseDecoder(model, 5, 30)
    size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    flight, state = jax.eval_shape(decoder._empty, decoder._weights), jax.eval_shape(lambda: model.init_state(5, 30))
    assert size(flight.unit) == size(state.body[1].units)
    assert size(flight.around) == size((state.body[0], state.body[2]))


@pytest.mark.parametrize("make, words", [
    (lambda: DepthwiseDecoder(build(archlab.get_config("transformer-nano"))), "not Repeat with 0"),
    (lambda: DepthwiseDecoder(build(mixture()), rows=0), "rows = 0"),
    (lambda: DepthwiseDecoder(build(mixture()), rows=4, unit_rows=5), "unit_rows = 5: must be .* from 1 to 4"),
    (lambda: DepthwiseDecoder(build(mixture(Residual(SwiGLU(8), Own(RMSNorm()))))), "each recursion owns its before"),
    (lambda: DepthwiseDecoder(build(mixture(around=Provide("x", Identity())))), r"published for later layers \(x\)"),
    (lambda: DepthwiseDecoder(build(mixture(around=Repeat(BLOCK, 2, scan=True)))), "give it scan=False"),
    (lambda: DepthwiseDecoder(build(mixture()), 2, 8).run([([1, 2, 3], 6)]), "new_tokens = 6: .*max_length = 8"),
    (lambda: list(DepthwiseDecoder(build(mixture()), 2, 8).run([([], 2)])), "a prompt of shape"),
    (lambda: list(DepthwiseDecoder(build(mixture()), 2, 8).run([([64], 2)])), "ids from 64 to 64"),
    (lambda: list(DepthwiseDecoder(build(mixture()), 2, 8).run([([1], 2)], eos=64)), "eos = 64"),
    (lambda: list(DepthwiseDecoder(build(mixture()), 2, 8).run([], repetition_penalty=1.2)), "repetition_penalty"),
])
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
