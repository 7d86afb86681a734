"""S4D: a diagonal state space for every channel (Gu et al. 2022, arXiv:2206.11893)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex

from archlab.layers.alphabet import parameter
from archlab.layers.config import LayerConfig, near, require
from archlab.layers.contract import Place, wide
from archlab.recurrence import hippo
from archlab.recurrence.memory import dot
from archlab.recurrence.state_space import (RATE, StateSpaceModule, StateSpaceState, as_complex, complex_normal,
                                            log_uniform, root)

# A [N] at the start, by the number n of the mode, of N / 2 (section 4; Lin and Inv imitate the spectrum of LegS).
SPECTRA = {
    "lin": lambda n: -0.5 + 1j * math.pi * n,
    "inv": lambda n: -0.5 + 1j * (2 * len(n) / math.pi) * (2 * len(n) / (2 * n + 1) - 1),
    "real": lambda n: -(n + 1) + 0j,
    "legs": lambda n: hippo.diagonal_plus_low_rank(2 * len(n))[0],
}
DISCRETISATIONS = ("zoh", "bilinear")


class S4D(LayerConfig):
    """S4's layer with a diagonal system.

    state: N, real numbers a channel; half as many complex modes are held. init: of A, "lin", "inv", "real" or "legs".
    discretisation: "zoh" or "bilinear". dt_min, dt_max: the range of step sizes at the start.
    """

    state: int = 64
    init: str = "lin"
    discretisation: str = "zoh"
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    def __post_init__(self):
        check_system(self)
        require(self.init in SPECTRA, self, "init", near(self.init, SPECTRA))

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> StateSpaceModule:
        ssm = DiagonalSSM(at.width, self.state, self.init, self.discretisation, (self.dt_min, self.dt_max), rngs)
        return StateSpaceModule(ssm, rngs, at)


def check_system(config) -> None:
    """Raises ValueError for a state, a discretisation or a range of steps that cannot be."""
    require(config.state >= 2 and config.state % 2 == 0, config, "state", "must be even: modes come in pairs")
    require(0 < config.dt_min <= config.dt_max, config, "dt_min", f"must be positive, at most dt_max = {config.dt_max}")
    how = getattr(config, "discretisation", "zoh")
    require(how in DISCRETISATIONS, config, "discretisation", near(how, DISCRETISATIONS))


class DiagonalSSM(nnx.Module):
    """Weights, of F channels with N / 2 modes M: log_dt [F]; A_log [F, M], of -Re A, and A_imag [F, M]; C [F, M, 2].
    B is 1: only its product with C counts."""

    def __init__(self, channels: int, state: int, init: str, discretisation: str, steps: tuple[float, float],
                 rngs: nnx.Rngs):
        F, M = channels, state // 2
        A = SPECTRA[init](np.arange(M))
        constant = lambda values: lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(values, dtype), shape)
        self.log_dt = parameter(rngs, "->F", (F,), log_uniform(*steps), rate=RATE)
        self.A_log = parameter(rngs, "->FN", (F, M), constant(np.log(-A.real)), rate=RATE)
        self.A_imag = parameter(rngs, "->FN", (F, M), constant(A.imag), rate=RATE)
        self.C = parameter(rngs, "->FN.", (F, M, 2), complex_normal, decay=True)
        self.discretisation = discretisation

    def init_state(self, batch: int, dtype) -> StateSpaceState:
        return StateSpaceState.zeros(batch, *self.A_log.shape, dtype)

    def system(self, length: int) -> "DiagonalSystem":
        A = jax.lax.complex(-jnp.exp(wide(self.A_log[...])), wide(self.A_imag[...]))
        log_a, scale = discretise(A, jnp.exp(wide(self.log_dt[...]))[:, None], self.discretisation)
        return DiagonalSystem(log_a, scale, as_complex(self.C))


def discretise(A: Complex[Array, "..."], dt: Array, how: str):
    """`x' = A x + B u` in steps of dt, A diagonal: `x_t = exp(log_a) x_{t-1} + scale B u_t`. Returns log_a and scale.

    "zoh" holds the input constant over a step, "bilinear" is the trapezoidal rule.
    """
    if how == "zoh":
        return dt * A, jnp.expm1(dt * A) / A
    return jnp.log((1 + dt * A / 2) / (1 - dt * A / 2)), dt / (1 - dt * A / 2)


@dataclasses.dataclass(frozen=True)
class DiagonalSystem:
    """A = exp(log_a), B and C, all [F, N]. The powers of A for a piece are products of some sqrt(T) short and sqrt(T)
    long ones, so that sums over modes are products of matrices and no [F, N, T] is held."""

    log_a: Complex[Array, "F N"]
    B: Complex[Array, "F N"]
    C: Complex[Array, "F N"]

    def step(self, x, u):
        return jnp.exp(self.log_a) * x + self.B * u[:, :, None]

    def read(self, x):
        return 2 * (self.C * x).real.sum(-1)

    def powers(self, exponents):
        """A^exponents: [F, n, N]."""
        return jnp.exp(self.log_a[:, None] * exponents[:, None])

    def kernel(self, length):
        small, large = self._split(length)
        long = (self.C * self.B)[:, None] * self.powers(large)
        return 2 * _real_dot("FIN,FQN->IQF", long, self.powers(small)).reshape(-1, self.B.shape[0])[:length]

    def respond(self, x, length):
        small, large = self._split(length)
        long = (self.C * x)[:, :, None] * self.powers(large + 1)
        y = 2 * _real_dot("BFIN,FQN->BIQF", long, self.powers(small))
        return y.reshape(len(x), -1, self.B.shape[0])[:, :length]

    def advance(self, x, steps):
        return jnp.exp(self.log_a * steps[:, None, None]) * x

    def absorb(self, u):
        small, large = self._split(u.shape[1])
        length = len(small) * len(large)
        u = jnp.pad(u, ((0, 0), (length - u.shape[1], 0), (0, 0))).reshape(len(u), len(large), len(small), -1)
        short, long = self.powers(small[::-1]), self.powers(large[::-1])
        within = jax.lax.complex(dot("BIQF,FQN->BFIN", u, short.real), dot("BIQF,FQN->BFIN", u, short.imag))
        return self.B * (within * long).sum(2)

    @staticmethod
    def _split(length):
        size = root(length)
        return jnp.arange(size), size * jnp.arange(-(-length // size))


def _real_dot(spec, a, b):
    """The real part of a product of complex arrays."""
    return dot(spec, a.real, b.real) - dot(spec, a.imag, b.imag)
