"""Measures decoding in depth-wise batches against lock-step, in which every row waits for the deepest.

    python -m experiments.depthwise --rows=32 --mean_depths=2

The model: a byte vocabulary; a block in front, a unit of `--unit` blocks that recurs up to three times, a block behind;
weights are random. The load: every token says by its own stream how deep it goes (`DepthChoice`); biases of the router
are set so that depths 1, 2 and 3 come in the shares of `LOADS`, and capacities are what that asks for, so that caches
are the same in all forms. Text is drawn at temperature 1. As many requests as rows, `--waves` times, all of one length,
so that what is measured is depth alone: lock-step never waits for a longer text. Three forms meet the same moods of the
machine, turn by turn. Each is timed, prefill included, in the steady state: while there is a queue, after a first wave.

    depth-wise   `DepthwiseDecoder`
    lock-step    the same with both applications as wide as the batch: the unit runs for the whole batch until its
                 deepest token is done, then the rest does
    padded       the model's own step for batches of as many rows, as in `generate`, with caches of the same slots:
                 each recursion's own, read in place

The bound is what no idle lane and no overhead would give: the ratio of blocks run for a token at full and at mean
depth. FLOPs are those of the programs times how often they ran, against what the depths used ask for. Medians of
ratios; the last line is JSON.

Some minutes a row of the table on four CPU cores. Seen there, on a busy machine, at the lightest load and 64 rows:
1.2 to 1.7 times lock-step, and no gain over padded with prefill counted, for depth-wise prompts are read one by one.
Decoding alone, it was some 1.1 times padded with a unit of 4 blocks and 1.2 times with one of 8.
"""

import itertools
import json
import statistics
import time

from absl import flags

from experiments import common

FLAGS = flags.FLAGS
flags.DEFINE_list("rows", ["8", "32", "64"], "Requests in flight.")
flags.DEFINE_list("mean_depths", ["1.5", "2", "2.5"], "Of the load; keys of LOADS.")
flags.DEFINE_integer("width", 256, "Of the stream.")
flags.DEFINE_integer("unit", 4, "Blocks in the unit.")
flags.DEFINE_integer("new_tokens", 112, "Of each request, after a prompt of 16.")
flags.DEFINE_integer("waves", 3, "Requests for each row, the first of which is not timed: at least 2.")
flags.DEFINE_integer("repeats", 5, "Turns behind each median.")
flags.DEFINE_string("takes", None, "unit_rows/rows,rest_rows/rows, as in 0.75,0.25; None for the decoder's choice.")

LOADS = {"1.5": (0.65, 0.2, 0.15), "2": (1 / 3, 1 / 3, 1 / 3), "2.5": (0.15, 0.2, 0.65)}  # of depths 1, 2, 3
PROMPT = 16


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    loads, all_rows = FLAGS.mean_depths, [int(n) for n in FLAGS.rows]
    for load in loads:
        if load not in LOADS:
            raise ValueError(f"--mean_depths={load}: there are {', '.join(LOADS)}")
    if min(*all_rows, FLAGS.unit, FLAGS.new_tokens, FLAGS.waves - 1, FLAGS.repeats) < 1:
        raise ValueError("--rows, --unit, --new_tokens and --repeats must be at least 1, --waves at least 2")
    takes = [float(share) for share in FLAGS.takes.split(",")] if FLAGS.takes else None
    results = []
    for load in loads:
        model = mixed_load(LOADS[load], FLAGS.width, FLAGS.unit)
        for rows in all_rows:
            results.append({"load": load} | compare(model, rows, FLAGS.new_tokens, FLAGS.waves, FLAGS.repeats, takes))
    shown = Table(box=None, header_style="bold")
    for column in results[0]:
        shown.add_column(column.replace("_", " "), justify="right")
    for row in results:
        shown.add_row(*(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=200).print(shown)
    print(json.dumps(results))


def mixed_load(shares: tuple[float, ...], width: int, blocks: int):
    """A model of which each token goes as deep as its stream says, the depths 1 to n in these shares."""
    import jax
    import numpy as np
    from flax import nnx

    from archlab.attention.attention import Attention
    from archlab.depth.depth_choice import DepthChoice
    from archlab.depth.mixture_of_recursions import MixtureOfRecursions
    from archlab.layers.mlp import SwiGLU
    from archlab.layers.residual import Residual
    from archlab.layers.sequence import Sequence
    from archlab.model import LanguageModel

    heads = width // 32
    block = Sequence(Residual(Attention(heads, kv_heads=max(1, heads // 4))), Residual(SwiGLU(8 * width // 3)))
    capacities = tuple(sum(shares[r:]) for r in range(len(shares)))
    middle = MixtureOfRecursions(Sequence(*[block] * blocks), len(shares), (1.0, *capacities[1:]),
                                 DepthChoice(balance_rate=0.01))
    config = LanguageModel(256, width, Sequence(block, middle, block))
    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    router = model.body.layers[1].router
    ids = jax.random.randint(jax.random.key(1), (8, 256), 0, 256)

    @jax.jit
    def load(model, bias):
        model.body.layers[1].router.balance[...] = bias
        return model(ids, logits="none").aux.traces["body/layers/1/router/load"]

    bias, step = np.zeros(len(shares), np.float32), 0.1
    for _ in range(60):
        bias += step * (np.asarray(shares, np.float32) - np.asarray(load(model, bias)))
        step *= 0.97
    router.balance[...] = bias
    return model


def compare(model, rows: int, new_tokens: int, waves: int, repeats: int, takes=None) -> dict:
    """Tokens a second of the three forms, and what the depth-wise one ran."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from archlab.inference.depthwise import DepthwiseDecoder

    total, length = rows * waves, PROMPT + new_tokens
    prompts = np.random.default_rng(0).integers(0, model.config.vocab, (total, PROMPT))
    takes = [None, None] if takes is None else [max(1, round(share * rows)) for share in takes]
    engines = {"depthwise": DepthwiseDecoder(model, rows, length, *takes),
               "lockstep": DepthwiseDecoder(model, rows, length, rows, rows)}

    @jax.jit
    def write(model, prompts, key):
        def step(i, carry):
            state, ids, text = carry
            out = model(ids, state, logits="last")
            ids = jax.random.categorical(jax.random.fold_in(key, i), out.logits[:, 0])[:, None]
            return out.state, ids, text.at[:, i].set(ids[:, 0])

        state = model(prompts[:, :-1], model.init_state(rows, length), logits="none").state
        text = jnp.zeros((rows, new_tokens), prompts.dtype)
        return jax.lax.fori_loop(0, new_tokens, step, (state, prompts[:, -1:], text))[2]

    def padded():
        for wave in range(1, waves):
            part = jnp.asarray(prompts[wave * rows:(wave + 1) * rows], jnp.int32)
            jax.block_until_ready(write(model, part, jax.random.key(wave)))

    def steady(engine):
        """Seconds and texts of all waves but the first, from a queue that does not end."""
        texts = engine.run(((prompts[i % total], new_tokens) for i in itertools.count()), temperature=1.0)
        list(itertools.islice(texts, rows))
        began = time.perf_counter()
        finished = list(itertools.islice(texts, total - rows))
        return time.perf_counter() - began, finished

    seconds, finished = {name: [] for name in (*engines, "padded")}, []
    for turn in range(repeats + 1):
        for name, engine in engines.items():
            taken, texts = steady(engine)
            seconds[name].append(taken)
            finished = texts if name == "depthwise" else finished
        began = time.perf_counter()
        padded()
        seconds["padded"].append(time.perf_counter() - began)
    seconds = {name: times[1:] for name, times in seconds.items()}  # the first compiled

    speed = {name: (total - rows) * new_tokens / statistics.median(times) for name, times in seconds.items()}
    ratio = lambda name: statistics.median(b / a for a, b in zip(seconds["depthwise"], seconds[name]))
    depths = np.concatenate([f.depths for f in finished])
    decoder = engines["depthwise"]  # its work: of the first wave too
    unit, rest = decoder.flops()
    work, (unit_rows, rest_rows) = decoder.work, decoder.takes
    mean = depths.mean()
    ideal = int(work.unit_tokens) * unit / unit_rows + int(work.rest_tokens) * rest / rest_rows
    spent = int(work.unit_calls) * unit + int(work.rest_calls) * rest
    needed = unit / unit_rows * mean + rest / rest_rows
    full = unit / unit_rows * model.config.body.layers[1].n + rest / rest_rows
    return {"rows": rows, "depth": float(mean),
            **{f"{name}_tokens_s": rate for name, rate in speed.items()},
            "over_lockstep": ratio("lockstep"), "over_padded": ratio("padded"), "bound": full / needed,
            "flops_over_ideal": spent / ideal,
            "unit_full": float(work.unit_tokens / (work.unit_calls * unit_rows)),
            "rest_full": float(work.rest_tokens / (work.rest_calls * rest_rows))}


if __name__ == "__main__":
    common.run(main)
