"""S5: one diagonal state space that all channels write to and read from (Smith et al. 2022, arXiv:2208.04933)."""

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, wide
from archlab.layers.mlp import add_bias
from archlab.recurrence import hippo
from archlab.recurrence.diagonal import DiagonalState, diagonal
from archlab.recurrence.forms import Form
from archlab.recurrence.s4d import check_system, discretise
from archlab.recurrence.state_space import RATE, as_complex, log_uniform, pairs


class S5(LayerConfig):
    """The S5 layer: the state space, GELU, and a gate of its output on itself (the published half GLU).

    state: P, real numbers for all channels together; half as many complex modes are held. blocks: J; the state begins
    as J HiPPO-N matrices of size P / J. discretisation: "zoh" or "bilinear". dt_min, dt_max: the range of step sizes at
    the start, one for each mode. clip: keeps the modes' rates of decay at 1e-4 or more, for texts of any length.
    """

    state: int = 64
    blocks: int = 1
    discretisation: str = "zoh"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    clip: bool = True
    form: Form | None = None

    def __post_init__(self):
        check_system(self)
        fits = self.blocks >= 1 and self.state % (2 * self.blocks) == 0
        require(fits, self, "blocks", f"state = {self.state} must divide into blocks of an even size")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "S5Module":
        return S5Module(self, rngs, at)


class S5Module(Layer):
    """Weights, of P / 2 modes N: A_real, A_imag and log_dt [N]; B [D, N, 2] and C [N, 2, D], pairs that stand for
    complex numbers; skip [D]; gate [D, D] and its bias [D]."""

    def __init__(self, config: S5, rngs: nnx.Rngs, at: Place):
        self.config = config
        D, P, J, N = at.width, config.state, config.blocks, config.state // 2
        A, _, _, V = hippo.diagonal_plus_low_rank(P // J)
        modes = lambda values: lambda key, shape, dtype: jnp.tile(jnp.asarray(values, dtype), J)

        def B(key, shape, dtype):  # drawn for real states, then turned into the basis of the modes
            drawn = nnx.initializers.lecun_normal()(key, (P, D), dtype).reshape(J, P // J, D)
            return pairs(jnp.einsum("rn,jrd->djn", V.conj(), drawn).reshape(D, N))

        def C(key, shape, dtype):
            drawn = jax.random.truncated_normal(key, -2, 2, (2, J, P // J, D), dtype) / (0.87962566 * P**0.5)
            turned = pairs(jnp.einsum("rn,jrd->jnd", V, jax.lax.complex(*drawn)).reshape(N, D))
            return jnp.moveaxis(turned, -1, 1)

        self.A_real = parameter(rngs, "->N", (N,), modes(A.real), rate=RATE)
        self.A_imag = parameter(rngs, "->N", (N,), modes(A.imag), rate=RATE)
        self.log_dt = parameter(rngs, "->N", (N,), log_uniform(config.dt_min, config.dt_max), rate=RATE)
        self.B = parameter(rngs, "D->N.", (D, N, 2), B, rate=RATE, decay=False)
        self.C = parameter(rngs, "N.->D", (N, 2, D), C)
        self.skip = parameter(rngs, "->D", (D,), jax.random.normal, decay=True)
        self.gate = parameter(rngs, "D->F", (D, D))
        self.gate_bias = parameter(rngs, "->F", (D,))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        return DiagonalState.zeros(batch, self.A_real.size, jnp.promote_types(dtype, jnp.complex64))

    def __call__(self, x, tokens: Tokens, state: DiagonalState | None = None):
        decay = wide(self.A_real[...])
        A = jax.lax.complex(jnp.minimum(decay, -1e-4) if self.config.clip else decay, wide(self.A_imag[...]))
        log_a, scale = discretise(A, jnp.exp(wide(self.log_dt[...])), self.config.discretisation)
        u = project(x, self.B, "BTD,DNC->BTNC")
        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        a = jnp.broadcast_to(jnp.exp(log_a), u.shape[:3])
        h, new = diagonal(a, scale * as_complex(u), tokens, past, self.config.form)
        parts = jnp.stack([h.real, -h.imag], -1)  # of 2 Re(C h)
        y = 2 * project(parts, self.C, "BTNC,NCD->BTD") + self.skip[...] * wide(x)
        y = jax.nn.gelu(y).astype(x.dtype)
        gate = jax.nn.sigmoid(add_bias(project(y, self.gate, "BTD,DF->BTF"), self.gate_bias))
        return y * gate, None if state is None else new, Aux()
