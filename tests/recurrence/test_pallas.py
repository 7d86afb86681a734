"""The kernels, as far as a CPU can tell: interpreted, against the step-by-step forms, and lowered for TPUs and GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from archlab.recurrence import channel_decay, delta_rule, diagonal, generalised_delta, scalar_decay, selective_scan
from archlab.recurrence.forms import Associative, Form, Kernel, Sequential
from archlab.recurrence.kernels import channel_decay as of_channels
from archlab.recurrence.kernels import diagonal as of_diagonals
from archlab.recurrence.kernels import matrix
from archlab.recurrence.kernels import selective_scan as of_scans
from archlab.recurrence.kernels.delta_rule import delta_rule_kernel
from archlab.recurrence.kernels.generalised_delta import generalised_delta_kernel
from archlab.recurrence.kernels.scalar_decay import scalar_decay_kernel
from archlab.recurrence.memory import MemoryState
from tests.helpers import tokens_of

# For each: the definition, the kernel, and the letters of the arrays before `starts` and after it.
KERNELS = {
    "scalar_decay": (scalar_decay.sequential, scalar_decay_kernel, "BGTN BGTN BHTP BHT", "BHNP"),
    "channel_decay": (channel_decay.sequential, of_channels.channel_decay_kernel, "BHTN BHTN BHTP BHTN", "BHNP"),
    "read_first": (functools.partial(channel_decay.sequential, read_first=True),
               functools.partial(of_channels.channel_decay_kernel, read_first=True), "BHTN BHTN BHTP BHTN", "BHNP"),
    "delta_rule": (delta_rule.sequential, delta_rule_kernel, "BGTN BGTN BHTP BHT BHT", "BHNP"),
    "generalised_delta": (generalised_delta.sequential, generalised_delta_kernel, "BHTN BHTN BHTP BHTN BHTN BHTN",
                          "BHNP"),
    "selective_scan": (selective_scan.sequential, of_scans.selective_scan_kernel, "BTF BTF FN BTN BTN", "BFN"),
    "diagonal": (lambda a, b, starts, h: diagonal.sequential(a, b, h),
                 lambda a, b, starts, h, **options: of_diagonals.diagonal_kernel(a, b, h, **options), "BTF BTF", "BF"),
}


def inputs(name, T, **sizes):
    """Decays from nearly 1 to nothing at all (a logarithm of minus infinity), keys of length 1, and documents that
    begin at a row's first token and inside, side by side."""
    sizes = dict(B=2, G=2, H=4, T=T, N=8, P=8, F=6) | sizes
    draw = np.random.default_rng(0)
    before, after = KERNELS[name][2:]
    arrays = [draw.normal(size=[sizes[x] for x in word]) for word in [*before.split(), after]]
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
    if name == "diagonal":
        arrays[0] = np.tanh(arrays[0])
    elif name == "selective_scan":
        arrays[1], arrays[2] = np.exp(arrays[1]), -np.exp(arrays[2])
    else:
        arrays[:2] = map(unit, arrays[:2])
        arrays[-2] = -np.exp(3 * arrays[-2])
        arrays[-2][:, :, 5] = -np.inf
    if name == "delta_rule":
        arrays[3] = 1 + np.tanh(arrays[3])  # from 0 to 2
    if name == "generalised_delta":
        arrays[3], arrays[4] = -unit(arrays[3]), unit(arrays[3]) / (1 + np.exp(arrays[4]))
    starts = np.zeros((sizes["B"], T), bool)
    starts[0, [0, T // 5, T // 5 + 1]] = starts[-1, T - 2] = True
    return [jnp.asarray(a, jnp.float32) for a in arrays], jnp.asarray(starts)


def weighed(run, starts):
    """A function of the arrays that depends on every output."""
    def loss(*arrays):
        y, state = run(*arrays[:-1], starts, arrays[-1])
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum() + (state**2).sum(), (y, state)

    return loss


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_the_steps_with_gradients(name, platform):
    """Three chunks, the last not whole; fewer groups than heads where there may be; on a GPU states in two tiles."""
    arrays, starts = inputs(name, 21, P=8 if platform == "tpu" else 2 * matrix.TILE)
    steps, kernel = KERNELS[name][:2]
    kernel = functools.partial(kernel, size=8, platform=platform, interpret=True)
    everything = tuple(range(len(arrays)))
    (want, want_grads), (got, got_grads) = (
        jax.jit(jax.grad(weighed(run, starts), argnums=everything, has_aux=True))(*arrays)[::-1]
        for run in (steps, kernel))
    for x, y in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("name", ["read_first", "delta_rule", "diagonal", "selective_scan"])
def test_chunks_of_one_step(name):
    arrays, starts = inputs(name, 7)
    *arrays, state = arrays
    steps, kernel = KERNELS[name][:2]
    want = jax.jit(steps)(*arrays, starts, state)
    got = jax.jit(functools.partial(kernel, size=1, interpret=True))(*arrays, starts, state)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_the_selective_scan_refuses_what_it_has_not():
    (*arrays, h), starts = inputs("selective_scan", 7)
    call = selective_scan.selective_scan
    with pytest.raises(ValueError, match=r"form = Form\(\): selective scans are computed by Sequential\(\), Assoc"):
        call(*arrays, starts, h, Form())
    with pytest.raises(ValueError, match=r"form = Kernel\(8\): needs a GPU or TPU"):
        call(*arrays, starts, h, Kernel(8))
    with pytest.raises(ValueError, match=r"A is \(8, 6\): must be \[F, N\] = \(6, 8\)"):
        call(*arrays[:2], arrays[2].T, *arrays[3:], starts, h)


def test_the_inverse_bears_keys_that_are_alike():
    """Of ones below the diagonal, whose powers a product of powers would have to cancel, to 1e17."""
    size = 64
    A = jnp.tril(jnp.ones((size, size)), -1)
    np.testing.assert_allclose(matrix.inverse(A), jnp.eye(size) - jnp.eye(size, k=-1), atol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_lower_for_tpus_and_gpus(name):
    """One kernel forward and one backward, on each."""
    arrays, starts = inputs(name, 128, B=1, N=16, P=32, F=256)

    def grad(platform):
        run = functools.partial(KERNELS[name][1], platform=platform)
        return jax.jit(jax.grad(weighed(run, starts), argnums=tuple(range(len(arrays))), has_aux=True))

    module = export.export(grad("tpu"), platforms=["tpu"])(*arrays).mlir_module()
    assert module.count("tpu_custom_call") == 2
    lowered = grad("gpu").trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("__gpu$xla.gpu.triton") == 2


def test_the_primitives_take_kernels():
    """As layers call them: padding, groups, and RWKV's bonus."""
    (q, k, v, g, S), _ = inputs("scalar_decay", 11, B=1)
    tokens, state = tokens_of([[1] * 4 + [2] * 5 + [0] * 2]), MemoryState(S, jnp.ones(1, jnp.int32))
    more = lambda a: jnp.repeat(a, 2, 1)
    slow = jnp.maximum(jnp.broadcast_to(g[..., None], v.shape), -3)
    calls = {
        "scalar_decay": lambda form: scalar_decay.scalar_decay(q, k, v, g, tokens, state, form),
        "channel_decay": lambda form: channel_decay.channel_decay(
            more(q), more(k), v, slow, tokens, state, v[0, :, 0], form),
        "delta_rule": lambda form: delta_rule.delta_rule(q, k, v, jnp.exp(g), g, tokens, state, form),
        "generalised_delta": lambda form: generalised_delta.generalised_delta(
            more(q), more(k), v, -more(k), more(k) / 2, slow, tokens, state, form),
    }
    for name, call in calls.items():
        run = jax.jit(call, static_argnums=0)
        (want, after), (got, now) = run(Sequential()), run(Kernel(4, interpret=True))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(now.matrix, after.matrix, rtol=1e-5, atol=1e-5, err_msg=name)
        with pytest.raises(ValueError, match="Associative"):
            call(Associative())


def test_what_fits():
    def state(N, P, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((1, 1, N, P), dtype)

    assert matrix.fitting(state(24, 128), 64, "tpu") == Kernel(64) and matrix.fitting(state(24, 128), 64, "gpu") is None
    assert matrix.fitting(state(64, 64), 16, "gpu") == Kernel(16) and matrix.fitting(state(64, 64), 15, "gpu") is None
    assert matrix.fitting(state(64, 64), 512) is None  # on a CPU
    assert matrix.fitting(state(64, 64, jnp.float64), 64, "tpu") is None
    assert matrix.fitting(state(256, 64), 64, "tpu") and matrix.fitting(state(256, 64), 64, "tpu", most=128) is None
    assert of_scans.fits(state(8, 16), "gpu") and not of_scans.fits(state(8, 12), "gpu")
    assert of_scans.fits(state(8, 12), "tpu") and not of_scans.fits(state(8, 16))
    assert of_diagonals.fits(jnp.float32, "gpu") and not of_diagonals.fits(jnp.complex64, "tpu")
    with pytest.raises(ValueError, match="power of 2"):
        Kernel(48)


def test_kernels_are_chosen_on_tpus_and_gpus(monkeypatch):
    """What a model of one's own would lower to there."""
    (q, k, v, g, S), _ = inputs("scalar_decay", 64, B=1, N=16, P=32)
    tokens, state = tokens_of(jnp.ones((1, 64), jnp.int32)), MemoryState(S, jnp.ones(1, jnp.int32))
    run = jax.jit(lambda *a: scalar_decay.scalar_decay(*a, tokens, state))
    for backend, platform, target in (("tpu", "tpu", "tpu_custom_call"), ("gpu", "cuda", "__gpu$xla.gpu.triton")):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        assert run.trace(q, k, v, g).lower(lowering_platforms=(platform,)).as_text().count(target) == 1
        jax.clear_caches()
