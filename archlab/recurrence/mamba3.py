"""Mamba-3: a state that turns as well as fades, written by the trapezoidal rule, R vectors at a time.

    S_t = a_t S_{t-1} + (1 - l_t) dt_t a_t K_{t-1}^T V_{t-1} + l_t dt_t K_t^T V_t        Y_t = Q_t S_t

Lahoti et al. 2026 (arXiv:2603.15569): exponential-trapezoidal discretisation, a complex state as rotations of keys and
queries by data-dependent angles that are summed over the document, and several inputs and outputs at once (MIMO): K and
Q are [R, N], V is [R, P]. There is no short convolution: the token before is in the recurrence.

From the published code: angles are `pi tanh(.) dt`; `a = exp(-dt A)` with A = f(.), 1 + x above 0 and 1 / (1 - x)
below, at least 1e-4; norm, then bias, then rotation of neighbouring channels; a skip D V before the gate. Its MIMO
kernel turns channels i and i + N/2 instead: the same up to their order. An optional norm before the output is left out.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from archlab.attention.positions import rotate
from archlab.layers.alphabet import parameter, project
from archlab.layers.config import LayerConfig, require
from archlab.layers.contract import Aux, Layer, Place, Tokens, document_starts, pytree, wide
from archlab.layers.norms import NormModule, RMSNorm
from archlab.recurrence.delta_net import one_per_head
from archlab.recurrence.diagonal import DiagonalState, diagonal
from archlab.recurrence.forms import Form
from archlab.recurrence.memory import MemoryState
from archlab.recurrence.scalar_decay import scalar_decay
from archlab.recurrence.step_size import step_bias

LEAST_RATE = 1e-4


class Mamba3(LayerConfig):
    """The layer, with one input and output for each state (SISO, rank 1) or R of them (MIMO).

    state: N. head_size: P; there are H = expand * D / P heads. groups: G, of heads that share keys and queries up to
    their biases. expand: values are `expand` times as wide as the stream. mimo_rank: R. rotated: the share of the N
    channels that turn; 0 for a real state, which cannot follow parity. form: of the recurrence; None to choose.
    """

    state: int = 128
    head_size: int = 64
    groups: int = 1
    expand: int = 2
    mimo_rank: int = 1
    rotated: float = 0.5
    form: Form | None = None

    def __post_init__(self):
        for field in ("state", "head_size", "groups", "expand", "mimo_rank"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")
        require(0 <= self.rotated <= 1, self, "rotated", "must be a share, from 0 to 1")

    def check(self, width: int) -> None:
        inner = self.expand * width
        require(inner % self.head_size == 0, self, "head_size", f"must divide expand * width = {inner}")
        heads = inner // self.head_size
        require(heads % self.groups == 0, self, "groups", f"must divide the {heads} heads")

    @property
    def recurrent(self) -> bool:
        return True

    def build(self, rngs: nnx.Rngs, at: Place) -> "Mamba3Module":
        return Mamba3Module(self, rngs, at)


@pytree
class Mamba3State:
    """memory: S [B, H, N, P] without the last token of the last document, and that document; angles [B, H A]: their
    sums so far, modulo 2 pi; of the last token its keys [B, H, R, N], values [B, H, R, P] and l dt [B, H]: own."""

    memory: MemoryState
    angles: DiagonalState
    keys: Float[Array, "B H R N"]
    values: Float[Array, "B H R P"]
    own: Float[Array, "B H"]


class Mamba3Module(Layer):
    """Weights: into and gate [D, H, P]; key and query [D, G, R, N], elsewhere called B and C, their norms [N] and
    biases [H, R, N]; step, rate and mix [D, H], to dt, A and l; dt_bias and skip [H]; angle [D, A], where anything
    turns; out [H, P, D]; for R > 1 also spread, spread_gate and gather [H, R, P], from P channels to R P and back.
    Traces: step_size [B, T], the mean step over heads; trapezoid [B, T], the mean of l."""

    def __init__(self, config: Mamba3, rngs: nnx.Rngs, at: Place):
        D, P, N, R, G, self.config = at.width, config.head_size, config.state, config.mimo_rank, config.groups, config
        H, A = config.expand * D // P, int(N * config.rotated) // 2
        ones, uniform = nnx.initializers.ones, lambda n: lambda *a: jax.random.uniform(*a, -1, 1) * n**-0.5
        into = lambda letters, *shape: parameter(rngs, f"D->{letters}", (D, *shape), uniform(D))
        self.into, self.gate = into("HK", H, P), into("HK", H, P)
        self.key, self.query = into("G.N", G, R, N), into("G.N", G, R, N)
        self.key_norm, self.query_norm = (NormModule(RMSNorm(1e-5), rngs, (N,), "->N") for _ in range(2))
        self.key_bias, self.query_bias = (parameter(rngs, "->H.N", (H, R, N), ones) for _ in range(2))
        self.step, self.rate, self.mix = into("H", H), into("H", H), into("H", H)
        self.dt_bias = parameter(rngs, "->H", (H,), step_bias)
        self.angle, self.pairs = into(".", A) if A else None, A
        self.skip = parameter(rngs, "->H", (H,), ones)
        given = lambda n: parameter(rngs, "->H.K", (H, R, P), nnx.initializers.constant(n), decay=True)
        self.spread, self.spread_gate, self.gather = map(given, (1 / R, 1.0, 1 / R)) if R > 1 else (None,) * 3
        self.out = parameter(rngs, "HK->D", (H, P, D), uniform(H * P * at.sharers))

    def init_state(self, batch, max_length, dtype=jnp.float32, memory=None):
        (H, R, N), P = self.key_bias.shape, self.config.head_size
        memory = MemoryState.zeros(batch, H, N, P, dtype)
        zeros = lambda *size: jnp.zeros((batch, H, *size), memory.matrix.dtype)
        angles = DiagonalState.zeros(batch, H * self.pairs, dtype)
        return Mamba3State(memory, angles, zeros(R, N), zeros(R, P), zeros())

    def __call__(self, x, tokens: Tokens, state: Mamba3State | None = None):
        past = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        dt = jax.nn.softplus(one_per_head(x, self.step) + self.dt_bias[...][:, None])
        dt = jnp.where(tokens.real[:, None], dt, 0)
        rate, mix = heavy_tail(one_per_head(x, self.rate)), jax.nn.sigmoid(one_per_head(x, self.mix))

        angles, turned = self.angles(x, dt, tokens, past.angles)
        k = self.rotated(x, self.key, self.key_norm, self.key_bias, angles)
        q = self.rotated(x, self.query, self.query_norm, self.query_bias, angles)
        v = spread(wide(project(x, self.into, "BTD,DHP->BHTP")), self.spread)
        y, (memory, *last) = trapezoidal(q, k, v, dt, mix, -rate * dt, tokens, past, self.config.form)

        y = y + self.skip[...][:, None, None, None] * v
        gate = spread(project(x, self.gate, "BTD,DHP->BHTP"), self.spread_gate)
        y = gathered(y.astype(x.dtype) * jax.nn.silu(gate), self.gather)
        mean = lambda a: jnp.where(tokens.real, a.mean(1), 0)
        aux = Aux(traces={"step_size": mean(dt), "trapezoid": mean(mix)})
        new = None if state is None else Mamba3State(memory, turned, *last)
        return project(y, self.out, "BHTP,HPD->BTD"), new, aux

    def angles(self, x, dt: Float[Array, "B H T"], tokens: Tokens, past: DiagonalState):
        """How far each pair of channels has turned since the document began, [B, H, T, A]; and the state after it."""
        (B, H, T), A = dt.shape, self.pairs
        if not A:
            return jnp.zeros((B, H, T, 0), dt.dtype), past
        pace = jnp.pi * jnp.tanh(wide(project(x, self.angle, "BTD,DA->BTA")))
        moved = jnp.swapaxes(dt, 1, 2)[..., None] * pace[:, :, None]
        sums, after = diagonal(jnp.ones((B, T, H * A), dt.dtype), moved.reshape(B, T, -1), tokens, past)
        after = dataclasses.replace(after, hidden=jnp.mod(after.hidden, 2 * jnp.pi))  # so that it stays precise
        return jnp.moveaxis(sums.reshape(B, T, H, A), 2, 1), after

    def rotated(self, x, weight, norm, bias, angles: Float[Array, "B H T A"]) -> Float[Array, "B H T R N"]:
        """Keys or queries of each head."""
        a = norm(wide(project(x, weight, "BTD,DGRN->BGTRN")))
        a = jnp.repeat(a, len(bias[...]) // a.shape[1], axis=1) + bias[...][:, None]
        return rotate(a, jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :], interleaved=True)


def heavy_tail(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 + x above 0 and 1 / (1 - x) below: smooth, positive, and never gone as fast as an exponential."""
    return jnp.maximum(jnp.where(x >= 0, 1 + x, 1 / (1 - jnp.minimum(x, 0))), LEAST_RATE)


def trapezoidal(q: Float[Array, "B H T R N"], k: Float[Array, "B H T R N"], v: Float[Array, "B H T R P"],
                dt: Float[Array, "B H T"], mix: Float[Array, "B H T"], log_decay: Float[Array, "B H T"], tokens: Tokens,
                past: Mamba3State, form: Form | None = None):
    """The recurrence over a piece, by one call of `scalar_decay` whose time runs over tokens and their R vectors.

    A token's vectors are written twice: at once with l_t dt_t, and again at the next token. Both are one write if the
    memory gets it at the next token: it takes `a_t (l_{t-1} dt_{t-1} + (1 - l_t) dt_t) K_{t-1}^T V_{t-1}`, nothing from
    another document, and each token adds its own first write to what it reads.

    Returns: y [B, H, T, R, P], and (memory, keys, values, own) after the piece.
    """
    B, H, T, R, _ = k.shape
    starts, _ = document_starts(tokens.segments, past.memory.segment)
    own = mix * dt
    after = tuple(newest(a, b, tokens) for a, b in ((past.keys, k), (past.values, v), (past.own, own)))
    k_before, v_before, own_before = (jnp.concatenate([a[:, :, None].astype(b.dtype), b[:, :, :-1]], 2)
                                      for a, b in ((past.keys, k), (past.values, v), (past.own, own)))
    write = jnp.where(starts[:, None], 0, jnp.exp(log_decay) * (own_before + (1 - mix) * dt))

    flat = lambda a: a.reshape(B, H, T * R, -1)
    written, each = write[..., None, None] * k_before, lambda a: jnp.repeat(a, R, axis=1)
    decay = jnp.pad(log_decay[..., None], ((0, 0),) * 3 + ((0, R - 1),)).reshape(B, H, -1)
    vectors = dataclasses.replace(tokens, segments=each(tokens.segments), positions=each(tokens.positions))
    y, memory = scalar_decay(flat(q), flat(written), flat(v_before), decay, vectors, past.memory, form)

    y = y.reshape(v.shape) + recall(q, k * own[..., None, None], v)
    if R > 1:  # what is written behind the one of the R steps in which a query reads
        y = y + recall(q, written, v_before, jnp.triu(jnp.ones((R, R), q.dtype), 1))
    return y, (memory, *after)


def recall(q: Float[Array, "B H T R N"], k: Float[Array, "B H T R N"], v: Float[Array, "B H T R P"], seen=1):
    """What a token's R queries find with R keys; seen [R, R]: which of them."""
    scores = jnp.einsum("BHTRN,BHTSN->BHTRS", q, k, precision="highest") * seen
    return jnp.einsum("BHTRS,BHTSP->BHTRP", scores, v, precision="highest")


def spread(a: Float[Array, "B H T P"], weight: nnx.Param | None) -> Float[Array, "B H T R P"]:
    """Each head's channels, R times over, each time weighted anew; once as they are without weights."""
    return a[:, :, :, None] if weight is None else a[:, :, :, None] * weight[...][:, None].astype(a.dtype)


def gathered(a: Float[Array, "B H T R P"], weight: nnx.Param | None) -> Float[Array, "B H T P"]:
    """The way back: the weighted sum over R."""
    return (a if weight is None else a * weight[...][:, None].astype(a.dtype)).sum(3)


def newest(past: Float[Array, "B H ..."], piece: Float[Array, "B H T ..."], tokens: Tokens) -> Float[Array, "B H ..."]:
    """What belongs to each row's last real token, in the dtype of the state; padding comes last."""
    line = jnp.concatenate([past[:, :, None], piece.astype(past.dtype)], 2)
    last = tokens.real.sum(1).reshape(-1, *[1] * (line.ndim - 1))
    return jnp.take_along_axis(line, last, 2)[:, :, 0]
