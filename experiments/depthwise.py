"""Measures decoding in depth-wise batches against decoding in which every token takes the time of all recursions.

    python -m experiments.depthwise --rows=64 --mean_depths=1.5,2,2.5

The model: a byte vocabulary; a block in front, a unit of `--unit` blocks that recurs up to three times, a block behind;
weights are random. The load: every token says by its own stream how deep it goes (`DepthChoice`); biases of the router
are set so that depths 1, 2 and 3 come in the shares of `LOADS`, and capacities are what that asks for, so that caches
are the same in both forms. Budgets cut some tokens short, so the depth really used, which is shown, is a little less.
Text is drawn at temperature 1. Two forms meet the same moods of the machine, turn by turn:

    depth-wise   `DepthwiseDecoder` in its steady state: texts of all ages are in flight, and the queue does not end
    padded       the model's own step for as many rows, over and over in one program: each recursion runs for the whole
                 batch, its caches, of the same slots, read in place

What is compared is decoding alone; reading a prompt is timed apart, for depth-wise prompts are read one by one. Medians
over the turns, of the ratio too. The bound is the ratio of blocks that a token passes at full depth and at the depth
used: what no overhead would give, if a row cost the same in a batch of any size. The last line is JSON.

Two and a half minutes on four idle CPU cores. Expected there: 1.23, 1.14 and 1.00 times the padded form.
"""

import itertools
import json
import time

from absl import flags

from experiments import common

FLAGS = flags.FLAGS
flags.DEFINE_list("rows", ["64"], "Requests in flight.")
flags.DEFINE_list("mean_depths", ["1.5", "2", "2.5"], "Of the load; keys of LOADS.")
flags.DEFINE_integer("width", 512, "Of the stream.")
flags.DEFINE_integer("unit", 6, "Blocks in the unit.")
flags.DEFINE_integer("new_tokens", 112, "Of each request, after a prompt of 16.")
flags.DEFINE_integer("steps", 16, "Of the model's own, behind one measurement; depth-wise makes as many tokens.")
flags.DEFINE_integer("turns", 9, "Measurements behind each median.")
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
    if min(*all_rows, FLAGS.unit, FLAGS.steps, FLAGS.new_tokens - FLAGS.steps + 1, FLAGS.turns) < 1:
        raise ValueError("--rows, --unit, --steps and --turns must be at least 1, --new_tokens at least --steps")
    takes = [float(share) for share in FLAGS.takes.split(",")] if FLAGS.takes else None
    results = []
    for load in loads:
        model = mixed_load(LOADS[load], FLAGS.width, FLAGS.unit)
        for rows in all_rows:
            measured = compare(model, rows, FLAGS.new_tokens, FLAGS.steps, FLAGS.turns, takes)
            blocks = lambda depth: FLAGS.unit * depth + 2
            results.append({"load": load, "rows": rows} | measured | {"bound": blocks(3) / blocks(measured["depth"])})
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


def compare(model, rows: int, new_tokens: int, steps: int, turns: int, takes=None) -> dict:
    """Tokens a second of both forms, and how full the applications of the depth-wise one were."""
    import jax
    import numpy as np

    from archlab.inference.depthwise import DepthwiseDecoder

    rng, length = np.random.default_rng(0), PROMPT + new_tokens
    prompts = rng.integers(0, model.config.vocab, (rows, PROMPT)).astype(np.int32)
    read = jax.jit(lambda model, prompts: model(prompts, model.init_state(rows, length), logits="none").state)

    @jax.jit
    def write(model, state, ids, key):
        def step(i, carry):
            state, ids = carry
            out = model(ids, state, logits="last")
            return out.state, jax.random.categorical(jax.random.fold_in(key, i), out.logits[:, 0])[:, None]

        return jax.lax.fori_loop(0, steps, step, (state, ids.astype(jax.numpy.int32)))

    def padded(turn):
        """Tokens a second, and milliseconds to read a prompt."""
        reading, state = timed(read, model, prompts[:, :-1])
        writing, _ = timed(write, model, state, prompts[:, -1:], jax.random.key(turn))
        return rows * steps / writing, 1e3 * reading / rows

    decoder = DepthwiseDecoder(model, rows, length, *([None, None] if takes is None else
                                                      [max(1, round(share * rows)) for share in takes]))
    reads, board = [], decoder._board  # seconds

    def watched(*args):
        seconds, flight = timed(board, *args)
        reads.append(seconds)
        return flight

    decoder._board = watched
    # of the first texts each ends at an age of its own, so that later ones do not go in step
    queue = ((prompts[i % rows], int(rng.integers(1, new_tokens + 1)) if i < rows else new_tokens)
             for i in itertools.count())
    texts = decoder.run(queue, temperature=1.0)
    list(itertools.islice(texts, rows))

    def depthwise():
        """As of `padded`; the mean depth; tokens in one application of the unit, and of the rest."""
        reads.clear()
        before, made, began = _numbers(decoder.work), 0, time.perf_counter()
        while made < rows * steps:
            next(texts)
            unit_calls, unit_tokens, rest_calls, made = (_numbers(decoder.work) - before).tolist()
        writing = time.perf_counter() - began - sum(reads)
        return (made / writing, 1e3 * float(np.median(reads)), unit_tokens / made, unit_tokens / unit_calls,
                made / rest_calls)

    padded(0), depthwise()  # compiles
    seen = np.array([(*depthwise(), *padded(turn)) for turn in range(turns)])
    speed, prompt_ms, depth, unit_rows, rest_rows, padded_speed, padded_prompt_ms = np.median(seen, 0).tolist()
    return {"depthwise_tokens_s": speed, "padded_tokens_s": padded_speed,
            "ratio": float(np.median(seen[:, 0] / seen[:, 5])), "depth": depth,
            "unit_full": unit_rows / decoder.takes[0], "rest_full": rest_rows / decoder.takes[1],
            "prompt_ms": prompt_ms, "padded_prompt_ms": padded_prompt_ms}


def timed(program, *args):
    """Seconds, and what came of it."""
    import jax

    jax.block_until_ready(args)
    began = time.perf_counter()
    result = jax.block_until_ready(program(*args))
    return time.perf_counter() - began, result


def _numbers(work):
    import numpy as np

    return np.array([work.unit_calls, work.unit_tokens, work.rest_calls, work.rest_tokens], int)


if __name__ == "__main__":
    common.run(main)
