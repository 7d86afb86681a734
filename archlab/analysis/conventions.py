"""What N is: parameters by group, and training FLOPs per token in every convention that scaling laws are fitted with.

The same runs give other exponents under another convention: one that leaves out embeddings (Kaplan) finds that a larger
share of the compute should go into size than one that counts them, because their share shrinks as models grow
(Pearce & Song 2024, arXiv:2406.12907; Porian et al. 2024, arXiv:2406.19146). So a run keeps them all, and a fit says
which one it takes.
"""

from flax import nnx

from archlab.analysis.accounts import abstract, looked_up, training_flops
from archlab.attention.attention import Attention
from archlab.attention.cross import CrossAttention
from archlab.attention.latent import LatentAttention
from archlab.attention.sparse import BigBird, Longformer
from archlab.depth.mixture_of_depths import MixtureOfDepths
from archlab.depth.mixture_of_recursions import MixtureOfRecursions
from archlab.depth.recur import Recur
from archlab.experts.moe import MoEModule
from archlab.layers.alphabet import lettered, parameters_of
from archlab.layers.config import Config
from archlab.layers.repeat import Repeat
from archlab.model import LanguageModel
from archlab.zoo import get_config

CONVENTIONS = ("counted", "6N", "6N+attention", "6N-all", "6N-body", "6N-body+attention", "6N-total")


def groups(config: LanguageModel | str) -> dict[str, float]:
    """Parameters by group, by config or name; ValueError for an unknown name.

    input_embedding, head, layers, routed_experts: every weight is in one of the four, and they sum to `total`.
      input_embedding is what is only looked up: the token table of an untied model, and learned positions. A tied table
      is stored once and stands under head, since that is where it multiplies. layers: norms, routers and shared experts
      too.
    total: all; `unique` is the same number, for no weight is stored twice. active: what one token meets, on average:
      top_k of the routed experts (at each recursion, where they recur), a weight counted once, however often it is
      met; active_computing: without input_embedding.
    applied: weights times how often a token passes through them.
    N_once, N_recurring, recursions: active weights that a token passes once (input_embedding left out) and those that
      it passes again, and how often it does: on average where capacities say so (mixture of recursions), at most where
      tokens halt by themselves; 1 without recursion. `applied - input_embedding = N_once + recursions N_recurring`.
    experts, active_experts: E and k of the routed layers (1 and 1 without; of unlike layers, a mean by weights).
    granularity: how many times an expert is smaller than a dense MLP of the usual 8 D^2 weights (4 D hidden channels,
      or 8/3 D gated): G = d_ff / d_expert of Krajewski et al. 2024 (arXiv:2402.07871). 1 without experts.
    """
    config = get_config(config) if isinstance(config, str) else config
    model = abstract(config)
    weights = parameters_of(model)
    sizes = {path: weight.size for path, weight in lettered(model).items()}
    table = set(looked_up(model))
    head = {path for path in weights if "V" in weights[path].letters} - table
    share = _shares_of_experts(model)
    take = lambda paths: sum(sizes[path] for path in paths)

    uses = {path: weights[path].uses if path in weights else 1.0 for path in sizes}
    again = {path for path in sizes if uses[path] > share.get(path, 1)}
    once = sizes.keys() - again - table
    recurring = sum(sizes[path] * share.get(path, 1) for path in again)
    applied_again = sum(sizes[path] * uses[path] for path in again)
    return {
        "input_embedding": take(table), "head": take(head), "routed_experts": take(share),
        "layers": take(sizes.keys() - table - head - share.keys()), "total": take(sizes), "unique": take(sizes),
        "active": sum(sizes[path] * min(1, uses[path]) for path in sizes),
        "active_computing": sum(sizes[path] * min(1, uses[path]) for path in sizes if path not in table),
        "applied": sum(sizes[path] * uses[path] for path in sizes),
        "N_once": sum(sizes[path] * uses[path] for path in once), "N_recurring": recurring,
        "recursions": applied_again / recurring if again else 1.0, **_experts(model, config.width),
    }


def conventions(config: LanguageModel | str, context: int) -> dict[str, float]:
    """Training FLOPs per token (forward and backward) for texts of `context` tokens, by the names of `CONVENTIONS`.

    A sixth of each is that convention's N, so that C = 6 N D holds in all of them.

    counted: what the program itself computes, products and all else, recurrences and routing too
      (`accounts.training_flops`). The closest to Chinchilla's own account (Hoffmann et al. 2022, arXiv:2203.15556,
      appendix F), which counts softmaxes as well as products.
    6N: N the applied weights, each as often as a token passes it (active experts, recursions), head included and what
      is only looked up left out. nanochat's choice, and that for which exponents are stablest across its runs.
    6N+attention: plus 12 L H K T, the products of queries with keys and of weights with values over full scores (PaLM,
      Chowdhery et al. 2022, arXiv:2204.02311, appendix B; nanochat). T is what a token may see: a window, a chunk or a
      sparse pattern bounds it; causality does not halve it. A router that lets a share c of the tokens pass leaves c T
      keys too. What layers without softmax scores do beside their weights is in no such formula: see counted.
    6N-all: what is looked up counts as if it multiplied; a tied table once. The 6 N D of most reports.
    6N-body: neither embedding nor head (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
    6N-body+attention: plus the scores: Kaplan's 6 N + 6 n_layer n_ctx d_attn, here not halved, to agree with PaLM's.
    6N-total: every weight once, less what is looked up: an account blind to sparsity and to reuse. For a dense model
      the same as 6N; too high for experts, too low for recursion.

    ValueError for an unknown name, or a context below 1.
    """
    if context < 1:
        raise ValueError(f"conventions: context = {context!r}: must be at least 1")
    config = get_config(config) if isinstance(config, str) else config
    counted, n = training_flops(config, context).total, groups(config)
    scores = 6 * attention_products(config, config.width, context)
    computing = n["applied"] - n["input_embedding"]
    body = computing - n["head"]
    return {"counted": counted, "6N": 6 * computing, "6N+attention": 6 * computing + scores,
            "6N-all": 6 * n["applied"], "6N-body": 6 * body, "6N-body+attention": 6 * body + scores,
            "6N-total": 6 * (n["total"] - n["input_embedding"])}


def attention_products(config: Config, width: int, context: float) -> float:
    """Multiply-adds per token of all softmax scores below `config` and of their sums over values, with full scores:
    2 H K T for each time that a token passes an attention layer. An encoder's text is as long as the decoder's."""
    below = lambda config, context: attention_products(config, width, context)
    match config:
        case Repeat() | Recur():
            return config.n * below(config.unit, context)
        case MixtureOfDepths():
            share = float(config.share)
            return share * below(config.unit, share * context)
        case MixtureOfRecursions():  # recursion r meets its own tokens, or what the first one kept of all
            seen = lambda share: context if config.cache == "shared" else share * context
            return sum(share * below(config.unit, seen(share)) for share in map(float, config.shares))
        case LatentAttention():
            return config.heads * (config.content_size + config.rotary_size + config.value_size) * context
        case Attention() | CrossAttention() | Longformer() | BigBird():
            return 2 * config.heads * (config.head_size or width // config.heads) * min(context, _seen(config, context))
    return sum(below(child, context) for child in config.children().values())


def _seen(config, context: float) -> float:
    """How many keys a query may see."""
    match config:
        case Attention(causal=causal) if config.sight.reach is not None:
            ahead = 0 if causal or config.chunk is not None else config.sight.reach - 1
            return config.sight.reach + ahead
        case Longformer():
            return config.window + config.globals
        case BigBird():
            return config.block * (config.window + config.globals + config.random)
    return context


def _routed(model: nnx.Module) -> dict[str, MoEModule]:
    """Path -> layer of routed experts."""
    return {"/".join(map(str, path)): module for path, module in nnx.iter_graph(model) if isinstance(module, MoEModule)}


def _met(module: MoEModule) -> float:
    """How many of its experts a token meets, on average."""
    return module.config.router.used(module.config.experts)


def _shares_of_experts(model: nnx.Module) -> dict[str, float]:
    """Path -> the share of it that one pass of one token meets, on average, for the weights of routed experts."""
    names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
    return {f"{path}/{name}": _met(module) / module.config.experts
            for path, module in _routed(model).items() for name in names if getattr(module, name) is not None}


def _experts(model: nnx.Module, width: int) -> dict[str, float]:
    """How many experts there are and a token meets, and how many times one goes into a dense MLP."""
    layers = [(module.up.size, module) for module in _routed(model).values()]
    if not layers:
        return {"experts": 1.0, "active_experts": 1.0, "granularity": 1.0}
    mean = lambda of: sum(size * of(module) for size, module in layers) / sum(size for size, _ in layers)
    expert = lambda config: (2 + config.gated) * width * config.hidden
    return {"experts": mean(lambda m: m.config.experts), "active_experts": mean(_met),
            "granularity": mean(lambda m: 8 * width**2 / expert(m.config))}
