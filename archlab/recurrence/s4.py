"""S4: a state space for every channel, diagonal plus rank one, that begins as HiPPO (Gu et al. 2021, arXiv:2111.00396).

The low-rank term is the conjugate of its own other side, `A = Lambda - P P*`, so that A is stable whatever is learned
(Goel et al. 2022, SaShiMi, arXiv:2202.09729, section 4.2).

The paper takes the kernel from its generating function (a Cauchy product), for one length that is folded into C. Here C
is C, and the kernel is the product of some sqrt(T) rows C A^q and columns A^(Qi) B, found by doubling: the same numbers
for every length, and the same powers carry the state from piece to piece.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameter
from archlab.layers.config import LayerConfig
from archlab.layers.contract import Place, wide
from archlab.recurrence import hippo
from archlab.recurrence.memory import dot
from archlab.recurrence.s4d import check_system
from archlab.recurrence.state_space import (RATE, StateSpaceModule, StateSpaceState, as_complex, complex_normal,
                                            log_uniform, pairs, root)


GROUP = 64  # channels whose powers of A are held at once


class S4(LayerConfig):
    """S4's layer: HiPPO-LegS at the start, discretised by the bilinear method.

    state: N, real numbers a channel; half as many complex modes are held. dt_min, dt_max: the range of step sizes at
    the start.
    """

    state: int = 64
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    def __post_init__(self):
        check_system(self)

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> StateSpaceModule:
        return StateSpaceModule(LowRankSSM(at.width, self.state, (self.dt_min, self.dt_max), rngs), rngs, at)


class LowRankSSM(nnx.Module):
    """Weights, of F channels with N / 2 modes M: log_dt [F]; A_log [F, M], of -Re Lambda, and A_imag [F, M]; P, B and C
    [F, M, 2]."""

    def __init__(self, channels: int, state: int, steps: tuple[float, float], rngs: nnx.Rngs):
        shape = (channels, state // 2)
        A, P, B, _ = hippo.diagonal_plus_low_rank(state)
        constant = lambda values: lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(values, dtype), shape)
        self.log_dt = parameter(rngs, "->F", (channels,), log_uniform(*steps), rate=RATE)
        self.A_log = parameter(rngs, "->FN", shape, constant(jnp.log(-A.real)), rate=RATE)
        self.A_imag = parameter(rngs, "->FN", shape, constant(A.imag), rate=RATE)
        self.P = parameter(rngs, "->FN.", (*shape, 2), constant(pairs(P)), rate=RATE)
        self.B = parameter(rngs, "->FN.", (*shape, 2), constant(pairs(B)), rate=RATE)
        self.C = parameter(rngs, "->FN.", (*shape, 2), complex_normal, decay=True)

    def init_state(self, batch: int, dtype) -> StateSpaceState:
        return StateSpaceState.zeros(batch, *self.A_log.shape, dtype)

    def system(self, length: int) -> "LowRankSystem":
        A = jax.lax.complex(-jnp.exp(wide(self.A_log[...])), wide(self.A_imag[...]))
        P, B, C = map(as_complex, (self.P, self.B, self.C))
        return LowRankSystem(A, P, B, C, jnp.exp(wide(self.log_dt[...]))[:, None], length)


class LowRankSystem:
    """The bilinear step of `A = Lambda - P P*`. All arrays [F, N], dt [F, 1]; for pieces of at most `longest` tokens.

    With one mode of each pair held, P* x is `2 Re(conj(P) . x)` and A is linear over the real numbers only: where
    powers of it are needed, x is taken as its real and imaginary parts, and A^(2^k) is a real matrix a channel.
    """

    def __init__(self, Lambda, P, B, C, dt, longest: int):
        self.parts = Lambda, P, B, C, dt
        self.longest = longest

    def step(self, x, u):
        """O(N): the explicit half step, then the implicit one, by Sherman and Morrison. Leading axes of x are free."""
        Lambda, P, B, _, dt = self.parts
        inner = lambda x: 2 * (P.conj() * x).real.sum(-1, keepdims=True)
        x = x + dt / 2 * (Lambda * x - P * inner(x)) + dt * B * u[..., None]
        solve = 1 / (1 - dt / 2 * Lambda)
        return solve * (x - dt / 2 * P * (inner(solve * x) / (1 + dt / 2 * inner(solve * P))))

    def read(self, x):
        return 2 * (self.parts[3] * x).real.sum(-1)

    def kernel(self, length):
        # Its powers of A are many times what the kernel weighs: the gradient takes them again.
        kernel = jax.checkpoint(lambda parts: LowRankSystem(*parts, self.longest)._kernel(length))
        channels = self.parts[0].shape[0]
        size = next(n for n in range(min(channels, GROUP), 0, -1) if channels % n == 0)
        if size == channels:
            return kernel(self.parts)
        groups = [part.reshape(-1, size, part.shape[1]) for part in self.parts]
        return jnp.moveaxis(jax.lax.map(kernel, groups), 0, 1).reshape(length, channels)

    def _kernel(self, length):
        short, long = self._split(length)
        return dot("FIN,FQN->IQF", self._doubled(self._input(), long), self._rows(short)).reshape(
            -1, self.parts[0].shape[0])[:length]

    def respond(self, x, length):
        short, long = self._split(length)
        first = _real(self.step(x, jnp.zeros(())))[:, :, None]
        y = dot("BFIN,FQN->BIQF", self._doubled(first, long), self._rows(short))
        return y.reshape(len(x), -1, x.shape[1])[:, :length]

    def advance(self, x, steps):
        x = _real(x)
        for k, power in enumerate(self.powers):
            x = jnp.where((steps[:, None, None] >> k) & 1, dot("FMN,BFN->BFM", power, x), x)
        return _complex(x)

    def absorb(self, u):
        short, long = self._split(u.shape[1])
        inputs = self._doubled(self._input(), short)[:, ::-1]
        length = inputs.shape[1] << len(long)
        u = jnp.pad(u, ((0, 0), (length - u.shape[1], 0), (0, 0))).reshape(len(u), -1, inputs.shape[1], u.shape[2])
        x = dot("BIQF,FQN->BFIN", u, inputs)
        for power in long:  # neighbours are joined, the earlier one aged by the later one's length
            x = dot("FMN,BFIN->BFIM", power, x[:, :, ::2]) + x[:, :, 1::2]
        return _complex(x[:, :, 0])

    @functools.cached_property
    def powers(self):
        """A, A^2, A^4, ... [F, N, N], real, as many as the bits of `longest`."""
        F, M = self.parts[0].shape
        basis = jnp.broadcast_to(jnp.eye(2 * M, dtype=self.parts[-1].dtype)[:, None], (2 * M, F, 2 * M))
        found = [jnp.moveaxis(_real(self.step(_complex(basis), jnp.zeros(()))), 0, 2)]
        while len(found) < self.longest.bit_length():
            found.append(dot("FMK,FKN->FMN", found[-1], found[-1]))
        return found

    def _split(self, length):
        """The powers that double up to sqrt(T), and those that double from there to T."""
        size, bits = root(length).bit_length() - 1, (length - 1).bit_length()
        return self.powers[:size], self.powers[size:bits]

    def _input(self):
        """B, discretised: what an input of 1 leaves. [F, 1, N]"""
        return _real(self.step(jnp.zeros_like(self.parts[0]), jnp.ones(())))[:, None]

    def _rows(self, powers):
        """C, C A, C A^2, ... [F, Q, N]"""
        C = self.parts[3]
        return self._doubled(2 * _real(C.conj())[:, None], [jnp.swapaxes(power, 1, 2) for power in powers])

    @staticmethod
    def _doubled(x, powers):
        """x [..., F, 1, N] and its images under powers of A, twice as many with every one of `powers`."""
        for power in powers:
            x = jnp.concatenate([x, dot("FMN,...FIN->...FIM", power, x)], -2)
        return x


def _real(x):
    return jnp.concatenate([x.real, x.imag], -1)


def _complex(x):
    return jax.lax.complex(*jnp.split(x, 2, -1))
