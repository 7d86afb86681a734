"""The accounts of an architecture: parameters, FLOPs per token and the size of its state, from the config alone.

Nothing is allocated or compiled: modules, states and programs are abstract.

Conventions. A multiply-add is two operations. Forward FLOPs are those of the program itself, the head included and the
embedding's look-up free: causal attention costs about half of a full score matrix (what its blocks compute), experts
cost what is routed to them. The training step is three forward passes of the training form (the backward pass does
every product twice; capacity and routing as in training), and recomputation is not counted: model FLOPs, not hardware
FLOPs. Where a layer has one form for rows of one document and another for packed ones, the dearer counts (long
convolutions), and a loop over further documents as one turn (sparse attention). For a dense model at a short context
this is the familiar 6N a token, with N the active parameters less the look-up table. Decoding is one token at the end
of a full context.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from archlab.analysis.flops import Flops, count
from archlab.encoder_decoder import EncoderDecoder
from archlab.experts.capacity import Capacity
from archlab.experts.dispatch import exactly
from archlab.layers.alphabet import lettered, parameters_of
from archlab.layers.contract import Training
from archlab.layers.positions import LearnedPositionsModule
from archlab.model import LanguageModel
from archlab.zoo import get_config

ROWS = 256  # texts over which a pass is counted: what experts' rows round up to whole blocks vanishes among so many


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of weights. Each weight is stored once and counts once, however often it is used.

    total: all, those too that no gradient moves but are part of a checkpoint (a router's balance). active: those that
    one token meets, on average: top_k of E experts, all of a shared or recurrent unit.
    applied: weights times how often a token passes through them: what 2N and 6N mean where weights are used again.
    embedding, active_body: total = embedding + body; embedding is every table over the vocabulary, tied, untied or
    look-up only; active_body is what is active of the body, by which architectures are matched. lookup: tables that
    are looked up only, of an untied model's tokens and of learned positions; active_computing: active less these.
    Models' cards count either way.
    """

    total: int
    active: int
    applied: int
    embedding: int
    lookup: int

    @property
    def active_computing(self) -> int:
        return self.active - self.lookup

    @property
    def unique(self) -> int:
        """Distinct weights: the total itself, since none is stored twice. What further use adds is in `applied`."""
        return self.total

    @property
    def active_body(self) -> int:
        return self.active - self.embedding


@dataclasses.dataclass(frozen=True)
class Profile:
    """What an architecture costs; `print` shows a table.

    FLOPs are per token. forward: evaluation of texts of `context` tokens. training: forward and backward in the
    training form. decode: one row's next token, with a state that holds `context`. state_bytes: what `batch` rows
    remember of `context` tokens, in the compute dtype.
    """

    context: int
    batch: int
    parameters: Parameters
    forward: Flops
    training: Flops
    decode: Flops
    state_bytes: int

    def __str__(self) -> str:
        p = self.parameters
        rows = [("parameters", "total", "active", "applied"),
                ("all", short(p.total), short(p.active), short(p.applied)),
                ("without embedding", short(p.total - p.embedding), short(p.active_body),
                 short(p.applied - p.embedding)), (),
                ("FLOPs per token", "matmul", "elementwise", "total")]
        passes = {"forward": self.forward, "training": self.training, "decode": self.decode}
        rows += [(name, short(f.matmul), short(f.elementwise), short(f.total)) for name, f in passes.items()]
        rows += [(), (f"state at {self.context:,} tokens", "", "", f"{self.state_bytes:,} bytes")]
        return "\n".join(f"{row[0]:<24}" + "".join(f"{cell:>14}" for cell in row[1:]) if row else "" for row in rows)


def profile(config: LanguageModel | str, context: int = 4096, batch: int = 1) -> Profile:
    """The accounts of a model, by config or name, for texts of `context` tokens in batches of `batch` rows.

    ValueError where a name is unknown, or context or batch is below 1.
    """
    config = get_config(config) if isinstance(config, str) else config
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"profile: {name} = {value!r}: must be at least 1")
    model, state = abstract(config), _state(config, context, 1)
    texts = _texts(config, context)
    with exactly():
        forward = count(lambda m, i: _run(m, i).logits, model, texts) / math.prod(texts.shape)
        decode = count(lambda m, i, s: m(i, state=s)[:2], model, _numbers(1, 1), state)  # and the state
    return Profile(context, batch, _parameters(model), forward, training_flops(config, context), decode,
                   state_bytes(config, context, batch))


def training_flops(config: LanguageModel, context: int) -> Flops:
    """Per token, forward and backward in the training form, for texts of `context` tokens."""
    training, texts = Training(jax.eval_shape(lambda: jax.random.key(0)), _numbers()), _texts(config, context)
    with exactly():
        once = count(lambda m, i, t: _run(m, i, t)[:3], abstract(config), texts, training)  # and what layers say
    return once * 3 / math.prod(texts.shape)


def count_parameters(config: LanguageModel) -> Parameters:
    """The numbers of weights alone: cheaper than the whole profile."""
    return _parameters(abstract(config))


def state_bytes(config: LanguageModel, context: int, batch: int = 1) -> int:
    """What `batch` rows remember of `context` tokens, in bytes, with caches in the compute dtype."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(_state(config, context, batch)))


def abstract(config: LanguageModel) -> nnx.Module:
    """The module with shapes for arrays.

    Repeated units are scanned: the same numbers from one traced body. Computation is in float32, in which no platform
    puts a kernel of its own, whose operations could not be seen, in the place of a layer's.
    """
    scanned = config.map(lambda c: dataclasses.replace(c, scan=True) if hasattr(c, "scan") else c)
    return nnx.eval_shape(lambda: dataclasses.replace(scanned, dtype="float32").build(nnx.Rngs(0)))


def short(number: float, pad: bool = True) -> str:
    """Three digits and a unit: 1200000 gives "1.20 M", without `pad` "1.2 M"; whole numbers below 1000 as they are."""
    units = ["", " k", " M", " G", " T", " P", " E"]
    pad = pad and not (abs(number) < 999.5 and number == int(number))
    while abs(number) >= 999.5 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:{'#' if pad else ''}.3g}".rstrip(".") + units[0]


def looked_up(model: nnx.Module) -> dict[str, nnx.Param]:
    """Path -> weight of the tables whose rows are taken and that multiply nothing: that of the tokens beside a head of
    its own, and learned positions."""
    tables = [path for path, module in nnx.iter_graph(model) if isinstance(module, LearnedPositionsModule)]
    tables += [] if model.head is None else [("embed",)]
    weights = parameters_of(model)
    return {path: weights[path] for path in ("/".join(map(str, (*table, "table"))) for table in tables)}


def _numbers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _texts(config: LanguageModel, context: int) -> jax.ShapeDtypeStruct:
    """The texts that a pass is counted over: rows that may share a capacity come together."""
    shared = math.lcm(*(c.rows for _, c in config.walk() if isinstance(c, Capacity)))
    return _numbers(-(-ROWS // shared) * shared, context)


def _state(config: LanguageModel, context: int, batch: int):
    dtype = jnp.dtype(config.dtype or jnp.float32)
    def make(model):
        source = jnp.zeros((batch, context), jnp.int32)
        memory = model.encode(source)[0] if isinstance(config, EncoderDecoder) else None
        return model.init_state(batch, context, dtype, memory=memory)

    return jax.eval_shape(make, abstract(config))


def _run(model, ids, training=None):
    """A pass over `ids`; an encoder-decoder reads a source as long."""
    memory = model.encode(ids, training=training)[0] if isinstance(model.config, EncoderDecoder) else None
    return model(ids, training=training or False, memory=memory)


def _parameters(model: nnx.Module) -> Parameters:
    weights = parameters_of(model).values()
    steered = sum(variable.size for variable in lettered(model).values()) - sum(w.size for w in weights)
    return Parameters(
        total=sum(w.size for w in weights) + steered,
        active=round(sum(w.size * min(1, w.uses) for w in weights)) + steered,
        applied=round(sum(w.size * w.uses for w in weights)) + steered,
        embedding=sum(w.size for w in weights if "V" in w.letters),
        lookup=sum(w.size for w in looked_up(model).values()),
    )
