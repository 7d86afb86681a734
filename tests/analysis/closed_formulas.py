"""What each layer of the zoo multiplies, by hand: multiply-adds per token, from the equations of the papers.

Nothing here traces or runs a layer. A formula is `(config, D, T) -> multiply-adds per token` of a text of T tokens in
the training form; `products` walks a config with them. Left out, because a batch shares it among all its tokens: what
is computed of weights alone (low-rank corrections `A B`, the taps of long convolutions).

Where a paper leaves it open how a sum is grouped, the formula follows the grouping that is used, which is named here:
    attention       each block of 128 queries meets all keys up to the block's end
    matrix states   in chunks of Q tokens: within a chunk as attention, between chunks through the state
    convolutions    by halves, the small ones (up to 32) by Toeplitz matrices, larger ones by FFT
"""

import math


BLOCK = 128
FORMULAS = {}


def formula(*names: str):
    """Registers the formula of the config classes of these names."""
    def register(fn):
        FORMULAS.update(dict.fromkeys(names, fn))
        return fn

    return register


def products(config, D: int, T: int, **told) -> float:
    """Multiply-adds per token below a config. KeyError for a class without a formula."""
    return FORMULAS[type(config).__name__](config, D, T, **told)


def model(config, T: int) -> float:
    """Of a language model: the body, the head, and an encoder that reads a text as long."""
    encoder = products(config.encoder, config.width, T) if hasattr(config, "encoder") else 0
    return products(config.body, config.width, T) + encoder + config.width * config.vocab


@formula("RMSNorm", "LayerNorm", "Normalise", "Identity", "LearnedPositions", "SinusoidalPositions", "RelativeBias",
         "LowerBounds")
def nothing(c, D, T):
    return 0


# combinators


@formula("Sequence", "Parallel")
def each(c, D, T, **told):
    return sum(products(layer, D, T, **told) for layer in c.layers)


@formula("Residual", "Provide", "LowRank", "Own")
def inside(c, D, T, **told):
    return products(c.layer, D, T, **told)


@formula("Gated")
def gated(c, D, T):
    return D + products(c.layer, D, T)


@formula("Repeat")
def repeat(c, D, T, **told):
    return c.n * products(c.unit, D, T, **told)


@formula("Recur")
def recur(c, D, T):
    return c.n * (products(c.unit, D, T) + (D if c.halting else 0))  # the probability of halting


@formula("Inject")
def inject(c, D, T):
    return 2 * D * D if c.how == "concat" else 0


@formula("MixtureOfDepths")
def mixture_of_depths(c, D, T):
    chosen = int(c.capacity * T)
    return D + chosen / T * products(c.unit, D, chosen)


@formula("MixtureOfRecursions")
def mixture_of_recursions(c, D, T):
    """Recursion r is for a share (n - r) / n of the tokens, or as given; the first one makes keys that are shared."""
    total = c.n * D  # of the routers: one number each, or n at once
    for r in range(c.n):
        chosen = int(c.capacities[r] * T) if c.capacities else (c.n - r) * T // c.n
        keys = dict(read=T) if r and c.cache == "shared" else {}
        total += chosen / T * products(c.unit, D, chosen, **keys)
    return total


# feed-forward


@formula("MLP")
def mlp(c, D, T, **_):
    return (2 + c.gated) * D * c.hidden


@formula("ChannelMix4", "ChannelMix5", "ChannelMix6")
def channel_mix(c, D, T):
    return 2 * D * c.hidden + D * D


@formula("ChannelMix7")
def channel_mix_7(c, D, T):
    return 2 * D * c.hidden


@formula("MoE")
def moe(c, D, T):
    """The router; the experts; the weighted sum of what they give. A capacity's buffers are computed whole."""
    router, E, kind = c.router, c.experts, type(c.router).__name__
    scores = {"Hierarchical": lambda: D * (E + router.groups),
              "MixtureOfRouters": lambda: len(router.stages) * D * E + (len(router.stages) - 1) * E * D
              + (D if router.skip else 0)}.get(kind, lambda: D * E)()
    met = router.factor if kind == "ExpertChoice" else router.k * (c.capacity.factor if c.capacity else 1)
    summed = E if kind == "ExpertChoice" else router.k  # any number of experts may have chosen a token
    return scores + met * (2 + c.gated) * D * c.hidden + summed * D


# attention


def keys_met(T: int, reach: int | None = None) -> float:
    """How many keys a query meets on average: its block meets all up to its own end, or those in reach of its first."""
    ends = [(min(BLOCK, T - start), min(T, start + BLOCK)) for start in range(0, T, BLOCK)]
    return sum(size * min(end, reach - 1 + size if reach else end) for size, end in ends) / T


def heads_of(c, D):
    K = c.head_size or D // c.heads
    return c.heads, c.kv_heads or c.heads, K


def projections(c, D):
    H, G, K = heads_of(c, D)
    return 2 * D * H * K + 2 * D * G * K


@formula("Attention")
def softmax_attention(c, D, T, read: int | None = None):
    """read: how many keys are there already, made by an earlier pass."""
    H, G, K = heads_of(c, D)
    if read:
        return 2 * D * H * K + 2 * H * K * read
    reach = min((n for n in (c.window, c.chunk) if n), default=None)
    return projections(c, D) + 2 * H * K * (keys_met(T, reach) if c.causal else T)


@formula("CrossAttention")
def cross_attention(c, D, T):
    H, _, K = heads_of(c, D)
    return projections(c, D) + 2 * H * K * T  # the source is as long as the text


@formula("LatentAttention")
def latent_attention(c, D, T):
    H, N, P, Q, C = c.heads, c.rank, c.content_size, c.rotary_size, c.value_size
    query = D * H * (P + Q) if c.query_rank is None else c.query_rank * (D + H * (P + Q))
    return query + D * (N + Q) + N * H * (P + C) + H * C * D + H * (P + Q + C) * keys_met(T)


def by_blocks(c, D, T, block: int, keys: int):
    """`block` queries share the keys that any of them sees. One block more is counted than a text has: a loop whose
    length only a batch's documents tell counts as one turn."""
    H, _, K = heads_of(c, D)
    return projections(c, D) + 2 * H * K * keys * (1 + block / T)


@formula("Longformer")
def longformer(c, D, T):
    return by_blocks(c, D, T, 64, c.globals + c.window + 63)


@formula("BigBird")
def bigbird(c, D, T):
    return by_blocks(c, D, T, c.block, c.block * (c.globals + c.random + c.window))


@formula("CausalLinformer")
def causal_linformer(c, D, T):
    """Each block's keys and values are summed to `rank`; a query meets all sums, its own block and the one before."""
    H, G, K = heads_of(c, D)
    return projections(c, D) + 2 * c.rank * G * K + 2 * H * K * (T // c.block * c.rank + 2 * c.block)


@formula("LinearAttention")
def linear_attention(c, D, T, features: int | None = None):
    """Katharopoulos et al. 2020: numerator phi(q) S and denominator phi(q) z, in chunks."""
    H, G, K = heads_of(c, D)
    Q, N = min(c.chunk, T), features or K
    return projections(c, D) + H * Q * (N + K) + H * N * (K + 1) + G * N * K


@formula("Performer")
def performer(c, D, T):
    H, G, K = heads_of(c, D)
    N = c.features or int(K * math.log(K))
    return linear_attention(c, D, T, N) + (H + G) * K * N


# matrix states


def scalar_decay(H, G, N, P, Q=32):
    """Mamba-2's chunks (Dao & Gu 2024, section 6): scores, their sums over values, what is read from the state and
    what is written to it. Within a chunk, the sums of log decays between any two tokens are a product with a table."""
    return G * Q * N + H * Q * P + 2 * H * N * P + H * Q * Q


def channel_decay(H, N, P, Q=16):
    """GLA's (Yang et al. 2023, section 4.3) with secondary chunks of every size 1, 2, ..., Q / 2: at each, decays to
    where a pair meets and the scores of those who meet."""
    levels = Q.bit_length() - 1
    return H * ((levels + 2) * Q * N + levels * Q * N + Q * P + 2 * N * P)


def inverse(Q):
    """Of a unit triangular matrix of Q = 32, a row of it: two triangular solves of 16 x 16, and the product of three
    blocks below."""
    half = Q // 2
    return (2 * half**3 / 2 + 2 * half**3) / Q


def delta_rule(H, G, N, P, Q=32):
    """DeltaNet's chunks (Yang et al. 2024, section 3.2): sums of log decays; k k^T and q k^T; what is recalled and what
    is answered from the state; the corrections; their answers; what is written."""
    return H * Q + 2 * G * Q * N + 2 * H * N * P + H * inverse(Q) + 2 * H * Q * P + H * N * P


def generalised_delta(H, N, P, Q=32):
    """RWKV-7's, diagonal plus rank one: sums of log decays of each channel; four kinds of scores; two reads of the
    state; the corrections and three sums over values; two writes."""
    return H * (Q * N + 4 * Q * N + 2 * N * P + inverse(Q) + 4 * Q * P + 2 * N * P)


@formula("Mamba2")
def mamba2(c, D, T):
    F = c.expand * D
    H, GN = F // c.head_size, c.groups * c.state
    return D * (2 * F + 2 * GN + H) + F * D + scalar_decay(H, c.groups, c.state, c.head_size)


@formula("Mamba3")
def mamba3(c, D, T):
    """R vectors a token take R places in a chunk; a token's own keys are read apart, for R > 1 those behind too."""
    F, N, P, R = c.expand * D, c.state, c.head_size, c.mimo_rank
    H = F // P
    projected = D * (2 * F + 2 * c.groups * R * N + 3 * H + int(N * c.rotated) // 2) + F * D
    own = (1 if R == 1 else 2) * H * R * R * (N + P)
    return projected + R * scalar_decay(H, H, N, P) + own


@formula("Retention")
def retention(c, D, T):
    E, H = c.expand * D, c.heads
    return 2 * D * D + 3 * D * E + scalar_decay(H, H, D // H, E // H)


@formula("LightningAttention")
def lightning(c, D, T):
    H, K = c.heads, c.head_size or D // c.heads
    return 5 * D * H * K + scalar_decay(H, H, K, K)


@formula("MLSTM")
def mlstm(c, D, T):
    """Queries, keys and values by blocks of 4 channels; two gates that see all three; the normaliser is one value."""
    F, H = c.expand * D, c.heads
    return 3 * D * F + 3 * 4 * F + 2 * 3 * F * H + scalar_decay(H, H, F // H, F // H + 1)


@formula("MLSTMLarge")
def mlstm_large(c, D, T):
    H, N, P = c.heads, int(c.keys * D) // c.heads, int(c.values * D) // c.heads
    return D * H * (2 * N + 3 * P + 2) + scalar_decay(H, H, N, P + 1)


@formula("GatedLinearAttention")
def gla(c, D, T):
    H, N, P = c.heads, c.key_size or D // (2 * c.heads), c.value_size or D // c.heads
    return D * H * (2 * N + 3 * P) + c.rank * (D + H * N) + channel_decay(H, N, P)


@formula("HGRN2")
def hgrn2(c, D, T):
    K = D // c.heads
    return 4 * D * D + channel_decay(c.heads, K, K)


@formula("RWKV5")
def rwkv5(c, D, T):
    return 5 * D * D + channel_decay(D // c.head_size, c.head_size, c.head_size)


@formula("RWKV6")
def rwkv6(c, D, T):
    low_rank = 2 * 5 * c.mix_rank * D + 2 * c.decay_rank * D  # what each of five takes of the token before; the decays
    return low_rank + rwkv5(c, D, T)


@formula("RWKV7")
def rwkv7(c, D, T):
    low_rank = 2 * D * (c.decay_rank + c.rate_rank + c.gate_rank + (c.value_rank or 0))
    return 4 * D * D + low_rank + generalised_delta(D // c.head_size, c.head_size, c.head_size)


@formula("DeltaNet")
def delta_net(c, D, T):
    G, H, N, P = c.heads, c.value_heads or c.heads, c.key_size, c.value_size
    return D * (2 * G * N + 2 * H * P + H) + delta_rule(H, G, N, P)


@formula("GatedDeltaNet")
def gated_delta_net(c, D, T):
    H = c.value_heads or c.heads
    return delta_net(c, D, T) + D * H * (1 + c.value_size)  # the decay and the gate


# other recurrences


@formula("Mamba")
def mamba(c, D, T):
    F, N, R = c.expand * D, c.state, c.dt_rank or math.ceil(D / 16)
    return 3 * D * F + F * (R + 2 * N) + R * F + F * N  # the last: y = C h


@formula("RGLRU")
def rg_lru(c, D, T):
    F = c.channels or D
    return 3 * D * F + 2 * F * F // c.blocks


@formula("MinGRU")
def min_gru(c, D, T):
    return 3 * D * c.expand * D


@formula("SLSTM")
def slstm(c, D, T):
    return 2 * 4 * D * D // c.heads  # four gates, from the stream and from the token before


@formula("RWKV4")
def rwkv4(c, D, T):
    return 4 * D * D


@formula("S5")
def s5(c, D, T):
    return 2 * D * c.state + D * D  # B and C, of state / 2 complex modes; the gate


# long convolutions: their small halves


def toeplitz(T: int) -> float:
    """Multiply-adds per token and channel: of each stretch of 2 n tokens, n <= 32, a matrix of n x n."""
    return sum(half / 2 for half in (1, 2, 4, 8, 16, 32) if half < T)


@formula("S4", "S4D")
def s4(c, D, T):
    return 2 * D * D + D * toeplitz(T)  # the value and the gate


@formula("H3")
def h3(c, D, T):
    return 4 * D * D + D * toeplitz(T) + D * c.head_dim * toeplitz(T)  # the shift; the diagonal one, of outer products


@formula("Hyena")
def hyena(c, D, T):
    return (c.order + 2) * D * D + (c.order - 1) * D * toeplitz(T)


# What is no product: recurrences of single channels and FFTs, in operations per token.


def halves_by_fft(T: int) -> float:
    """Per token and channel: the token itself, a sum for every size of halves, and for halves n of 64 and more two
    transforms of 2 n, each 5 (2 n) log2 (2 n), and n complex products of 6 operations."""
    return 1 + math.log2(T) + sum(2 * 5 * math.log2(2 * n) + 3 for n in (2**b for b in range(6, 32)) if n < T)


ELEMENTWISE = {
    "Mamba": lambda c, D, T: c.expand * D * (5 * c.state + 1),  # exp(dt A): 2; decay h + B (dt x): 3 and 1
    "RGLRU": lambda c, D, T: 2 * (c.channels or D),  # a h + b
    "MinGRU": lambda c, D, T: 2 * c.expand * D,
    "S5": lambda c, D, T: 8 * c.state // 2,  # the same of complex numbers
    # Peng et al. 2023, appendix D: the peak 2, decay and write 3 + 2 + 1, two sums 4, the bonus 2 + 2 + 3, the mean 6
    "RWKV4": lambda c, D, T: 25 * D,
    "S4": lambda c, D, T: D * halves_by_fft(T),
    "S4D": lambda c, D, T: D * halves_by_fft(T),
    "H3": lambda c, D, T: D * (1 + c.head_dim) * halves_by_fft(T),
    "Hyena": lambda c, D, T: (c.order - 1) * D * halves_by_fft(T),
}


def elementwise(config, D: int, T: int) -> float:
    """Operations per token, beside products, of the recurrences and FFTs below a config, which no router bounds."""
    own = ELEMENTWISE.get(type(config).__name__, lambda *_: 0)(config, D, T)
    return getattr(config, "n", 1) * (own + sum(elementwise(c, D, T) for c in config.children().values()))
