"""Measures what routing over depth saves: time of training and prefill, work of decoding, bytes of caches.

    python -m experiments.recursion
    python -m experiments.recursion --parts=speed --runs=runs/depth

routed   the recursed part of a Mixture-of-Recursions with 3 recursions and capacities 3/3, 2/3, 1/3, forward and
         backward in the training form, and a prefill through a state, against the same recursion without routing; the
         whole training step likewise; a Mixture-of-Depths block at 12.5% against the block itself.
decode   operations of a decode step by the depth that its token takes, counted in the program with each conditional as
         it goes, averaged over a text that the model writes; against the mean depth used.
cache    bytes of the unit's keys and values in the state, against the formulas: (n + 1) / 2n of full where recursions
         keep their own, 1 / n where they share the first one's.
speed    of the models that `experiments.depth` left under --runs: tokens a second and bytes of the state at each batch.
         Mixtures of recursions decode depth-wise, others in lock-step. Leaves speed.json there, for the report page.

Forms take turns, so that all meet the same moods of the machine: compare ratios. The last line is JSON.

About four minutes on four CPU cores without `speed`. Expected there: the routed recursion takes 0.60 to 0.67 of the
time (a third less work, and attention among fewer), Mixture-of-Depths 0.13 or less; operations of decoding follow the
mean depth within 5%.
"""

import json
import statistics
import time
from pathlib import Path

from absl import flags

from experiments import common

PARTS = ("routed", "decode", "cache", "speed")

FLAGS = flags.FLAGS
flags.DEFINE_list("parts", list(PARTS[:3]), f"Some of {', '.join(PARTS)}.")
flags.DEFINE_integer("width", 256, "D; heads of 64, MLPs of 8/3 D.")
flags.DEFINE_integer("blocks", 2, "Blocks in the unit.")
flags.DEFINE_list("shapes", ["8x512", "2x2048"], "Rows x tokens of `routed`.")
flags.DEFINE_integer("repeats", 5, "Turns behind each median.")
flags.DEFINE_integer("new_tokens", 256, "Tokens that `decode` writes, and `speed` for each row.")
flags.DEFINE_list("batches", ["1", "4", "16", "64"], "Rows of `speed`.")
flags.DEFINE_string("runs", "runs/depth", "The folder of `experiments.depth` that `speed` reads and writes.")


def main() -> None:
    if unknown := set(FLAGS.parts) - set(PARTS):
        raise ValueError(f"--parts={','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if min(FLAGS.width, FLAGS.blocks, FLAGS.repeats, FLAGS.new_tokens) < 1 or FLAGS.width % 64:
        raise ValueError("--blocks, --repeats and --new_tokens must be at least 1, and 64 must divide --width")
    rows = []
    for part in FLAGS.parts:
        found = {"routed": routed, "decode": decode, "cache": cache, "speed": speed}[part]()
        show(part, found)
        rows += [{"part": part} | row for row in found]
    print(json.dumps(rows))


def show(title: str, rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", title=title)
    for i, column in enumerate(rows[0]):
        table.add_column(column.replace("_", " "), justify="right" if i else "left")
    for row in rows:
        table.add_row(*(f"{value:,.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)


def block():
    from archlab.attention.attention import Attention
    from archlab.layers.mlp import SwiGLU
    from archlab.layers.residual import Residual
    from archlab.layers.sequence import Sequence

    return Sequence(Residual(Attention(FLAGS.width // 64)), Residual(SwiGLU(8 * FLAGS.width // 3)))


def unit():
    from archlab.layers.sequence import Sequence

    return Sequence(*[block()] * FLAGS.blocks)


def in_turn(forms: dict) -> dict[str, float]:
    """The median seconds of each form, which is called once before, to be compiled."""
    import jax

    seconds = {name: [] for name in forms}
    for turn in range(FLAGS.repeats + 1):
        for name, form in forms.items():
            began = time.perf_counter()
            jax.block_until_ready(form())
            seconds[name] += [time.perf_counter() - began] if turn else []
    return {name: statistics.median(times) for name, times in seconds.items()}


def routed() -> list[dict]:
    """Times of routed layers over those of the same layers without routing."""
    from archlab.depth.mixture_of_depths import MixtureOfDepths
    from archlab.depth.mixture_of_recursions import MixtureOfRecursions
    from archlab.depth.recur import Recur

    rows, recursion, all_of_it = [], MixtureOfRecursions(unit(), 3), Recur(unit(), 3)
    for shape in FLAGS.shapes:
        B, T = map(int, shape.split("x"))
        for what, make in {"recursed part, training": training, "recursed part, prefill": prefill,
                           "whole step, a block before and behind": whole_step}.items():
            times = in_turn({"routed": make(recursion, B, T), "all": make(all_of_it, B, T)})
            rows.append({"what": what, "shape": shape, "routed_ms": 1e3 * times["routed"], "all_ms": 1e3 * times["all"],
                         "ratio": times["routed"] / times["all"]})
    times = in_turn({"routed": training(MixtureOfDepths(block()), 2, 2048), "all": training(block(), 2, 2048)})
    rows.append({"what": "Mixture-of-Depths at 12.5%, training", "shape": "2x2048", "routed_ms": 1e3 * times["routed"],
                 "all_ms": 1e3 * times["all"], "ratio": times["routed"] / times["all"]})
    return rows


def training(config, B: int, T: int):
    """Forward and backward of one layer, in the training form."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from archlab.layers.contract import Place, Tokens, Training

    structure, weights = nnx.split(config.build(nnx.Rngs(0), Place(FLAGS.width, 0, config.branches)))
    tokens = Tokens(jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T), (B, 1)), Training(jax.random.key(0), 0))

    def loss(weights, x):
        y, _, aux = nnx.merge(structure, weights)(x, tokens)
        return (y * y).mean() + aux.loss()

    step, x = jax.jit(jax.value_and_grad(loss, (0, 1))), jax.random.normal(jax.random.key(1), (B, T, FLAGS.width))
    return lambda: step(weights, x)


def prefill(config, B: int, T: int):
    """A pass of one layer into a state."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from archlab.layers.contract import Place, Tokens

    structure, weights = nnx.split(config.build(nnx.Rngs(0), Place(FLAGS.width, 0, config.branches)))
    tokens = Tokens(jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T), (B, 1)))

    @jax.jit
    def run(weights, x):
        layer = nnx.merge(structure, weights)
        return layer(x, tokens, layer.init_state(B, T))[:2]

    x = jax.random.normal(jax.random.key(1), (B, T, FLAGS.width))
    return lambda: run(weights, x)


def language_model(middle):
    from archlab.layers.sequence import Sequence
    from archlab.model import LanguageModel

    return LanguageModel(256, FLAGS.width, Sequence(block(), middle, block()))


def whole_step(middle, B: int, T: int):
    """A training step of a language model of bytes, with a block before the layer and one behind."""
    import numpy as np

    from archlab.data.batches import Batch
    from archlab.training.optimizers import Optimizer
    from archlab.training.step import create_state, make_train_step, parameters

    config = language_model(middle)
    transform = Optimizer().build(parameters(config))
    structure, state, _ = create_state(config, transform, seed=0)
    step = make_train_step(structure, transform, np.ones(256))
    ids = np.random.default_rng(0).integers(0, 256, (B, T)).astype(np.int32)
    batch, held = Batch(ids, ids, np.ones((B, T), np.float32), np.ones((B, T), np.int32)), [state]

    def run():
        held[0], metrics = step(held[0], batch, 1e-3)
        return metrics

    return run


def decode() -> list[dict]:
    """Operations of a decode step by depth, and over a text that is written greedily."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from archlab.analysis.flops import count
    from archlab.depth.depth_choice import DepthChoice
    from archlab.depth.mixture_of_recursions import MixtureOfRecursions
    from archlab.depth.top_tokens import TopTokens
    from archlab.layers.repeat import unstack

    rows = []
    for name, router in {"expert choice": TopTokens(), "token choice": DepthChoice()}.items():
        model = unstack(language_model(MixtureOfRecursions(unit(), 3, router=router)).build(nnx.Rngs(0)))
        step = jax.jit(lambda model, ids, state: model(ids, state))
        state, ids, depths = model.init_state(1, FLAGS.new_tokens), jnp.zeros((1, 1), jnp.int32), []
        for i in range(FLAGS.new_tokens):
            out = step(model, ids, state)
            depths.append(int(out.aux.traces["body/layers/1/depth"][0, 0]))
            state = out.state
            ids = jax.random.categorical(jax.random.key(i), out.logits[:, -1:])

        def operations(depth: int) -> float:
            taken = iter([True] * (depth - 1) + [False] * (3 - depth))  # the first recursion is for all tokens
            return count(step, model, ids, state, cond=lambda branches: branches[next(taken)]).total

        by_depth = {depth: operations(depth) for depth in (1, 2, 3)}
        one = by_depth[2] - by_depth[1]
        spent, used = np.mean([by_depth[depth] for depth in depths]), float(np.mean(depths))
        rows.append({"router": name, "mean_depth": used, "mflop_1": by_depth[1] / 1e6, "mflop_2": by_depth[2] / 1e6,
                     "mflop_3": by_depth[3] / 1e6, "mflop_a_token": spent / 1e6,
                     "recursions_paid": 1 + (spent - by_depth[1]) / one,
                     "paid_over_used": (1 + (spent - by_depth[1]) / one) / used})
    return rows


def cache() -> list[dict]:
    """Bytes of keys and values in the state of the recursion."""
    import jax
    from flax import nnx

    from archlab.attention.cache import KVCache
    from archlab.depth.mixture_of_recursions import MixtureOfRecursions
    from archlab.layers.contract import Place

    length, rows = 4096, []

    def held(n: int, **fields) -> int:
        config = MixtureOfRecursions(unit(), n, **fields)
        made = nnx.eval_shape(lambda: config.build(nnx.Rngs(0), Place(FLAGS.width, 0, config.branches)))
        state = jax.eval_shape(lambda: made.init_state(1, length))
        caches = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, KVCache))
        return sum(4 * (a.keys.size + a.values.size) for a in caches if isinstance(a, KVCache))

    for n in (2, 3, 4):
        full = held(n, capacities=(1.0,) * n)
        for name, formula, fields in [("recursion", (n + 1) / (2 * n), {}), ("shared", 1 / n, {"cache": "shared"}),
                                      ("recursion, slack 0.1", (1 + 1.1 * (n - 1) / 2) / n, {"slack": 0.1})]:
            found = held(n, **fields)
            rows.append({"cache": name, "n": n, "bytes_at_4096": found, "of_full": found / full, "formula": formula})
    return rows


def speed() -> list[dict]:
    """Tokens a second of trained models, and what their states hold."""
    import jax
    import numpy as np

    import archlab
    from archlab.depth.mixture_of_recursions import MixtureOfRecursions
    from archlab.inference.depthwise import DepthwiseDecoder
    from archlab.inference.generation import generate
    from archlab.layers.repeat import unstack

    folder, rows, prompt = Path(FLAGS.runs), [], 16
    models = sorted(folder.glob("models/*/"))
    if not models:
        raise ValueError(f"--runs={folder}: has no models; run python -m experiments.depth --out={folder} first")
    for batch in map(int, FLAGS.batches):
        forms, size = {}, {}
        for path in models:
            model, total = archlab.load(path), prompt + FLAGS.new_tokens
            queue = np.random.default_rng(0).integers(0, model.config.vocab, (batch, prompt))
            size[path.name] = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(
                jax.eval_shape(lambda: model.init_state(batch, total))))
            if any(isinstance(config, MixtureOfRecursions) for _, config in model.config.walk()):
                engine = DepthwiseDecoder(model, batch, total)
                requests = [(row, FLAGS.new_tokens) for row in queue]
                forms[path.name] = lambda engine=engine, requests=requests: [f.tokens for f in engine.run(requests)]
            else:
                apart = unstack(model)
                forms[path.name] = lambda apart=apart, queue=queue: generate(apart, queue, FLAGS.new_tokens)
        for name, seconds in in_turn(forms).items():
            rows.append({"model": name, "batch": batch, "decode_tokens_per_second": batch * FLAGS.new_tokens / seconds,
                         "state_bytes": size[name]})
    (folder / "speed.json").write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    common.run(main)
