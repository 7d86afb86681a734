"""Measures speed and memory of models: training, prefill, time to the first token, decoding, over context lengths.

    python -m experiments.bench --models=transformer-small,mamba-small
    python -m experiments.bench --models=transformer-small --peer=transformers --decode_batches=1,8
    python -m experiments.bench --models=transformer-small --peer=compiled --contexts=1024

Every result is waited for, compilation is timed apart, and an MFU above 100% is refused as a measurement gone wrong.
With --peer the same shapes run in Hugging Face transformers (extra [interop]) in a process of its own, turn by turn
with ours, so that both meet the same moods of the machine; compare ratios, not absolute figures. --peer=compiled sends
its training step and forward pass through `torch.compile`; its `generate` stays as it is. The last line is JSON.

About a minute a model and shape on four CPU cores. Expected there: transformer-small trains as fast as the peer within
some 15%, mamba-small several times as fast; both decode 2 to 4 times as fast.
"""

import json
import statistics
import time

from absl import flags

from experiments import common

RATE = 1e-3  # a step's learning rate
FLAGS = flags.FLAGS
flags.DEFINE_list("models", ["transformer-small", "mamba-small"], "Names of the zoo, or Python files with a CONFIG.")
flags.DEFINE_multi_string("set", [], "path=value: changes a field of every model's config. Repeatable.")
flags.DEFINE_string("dtype", None, "Compute dtype: bfloat16 or float32.")
flags.DEFINE_integer("batch", 8, "Rows of a training step.")
flags.DEFINE_integer("context", 512, "Tokens a row of a training step.")
flags.DEFINE_integer("steps", 5, "Training steps behind each median; 0 for none.")
flags.DEFINE_list("contexts", ["1024", "4096"], "Prompt lengths at which prefill and decoding are timed; or empty.")
flags.DEFINE_list("decode_batches", ["1"], "Rows at which decoding is timed.")
flags.DEFINE_integer("new_tokens", 64, "Tokens generated after each prompt.")
flags.DEFINE_integer("repeats", 3, "Generations behind each median.")
flags.DEFINE_enum("peer", None, ["transformers", "compiled"], "Run the same shapes there too, turn by turn.")


def main() -> None:
    import jax
    from rich.console import Console
    from rich.table import Table

    from experiments.peer import Peer

    if FLAGS.batch < 1 or FLAGS.context < 1 or FLAGS.steps < 0 or FLAGS.repeats < 1 or FLAGS.new_tokens < 1:
        raise ValueError("--batch, --context, --repeats and --new_tokens must be at least 1, --steps at least 0")
    contexts, batches = ([int(n) for n in numbers] for numbers in (FLAGS.contexts, FLAGS.decode_batches))
    rows = []
    for name in FLAGS.models:
        config = common.model_config(name, FLAGS.set, FLAGS.dtype)
        peer = Peer(config, compiled=FLAGS.peer == "compiled") if FLAGS.peer else None
        rows += [training_row(name, config, peer)] if FLAGS.steps else []
        rows += [prefill_row(name, config, context, peer) for context in contexts]
        rows += [generation_row(name, config, batch, context, peer) for batch in batches for context in contexts]
        if peer:
            peer.close()

    shown = Table(box=None, header_style="bold", title=f"{jax.device_count()} x {jax.devices()[0].device_kind}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for i, column in enumerate(columns):
        shown.add_column(column.replace("_", " "), justify="right" if i > 1 else "left")
    for row in rows:
        shown.add_row(*(format_cell(row.get(column)) for column in columns))
    Console(width=200).print(shown)
    print(json.dumps(rows))


def training_row(name: str, config, peer) -> dict:
    """Median speed of a whole training step (forward, backward, AdamW), and the memory of its program."""
    import jax
    import numpy as np

    from archlab.analysis.accounts import profile
    from archlab.analysis.collectives import memory
    from archlab.data import Batch
    from archlab.training.metrics import peak_flops
    from archlab.training.optimizers import Optimizer
    from archlab.training.step import create_state, make_train_step, parameters

    B, T = FLAGS.batch, FLAGS.context
    ids = np.random.default_rng(0).integers(0, config.vocab, (B, T), dtype=np.int32)
    ones = np.ones((B, T), np.int32)
    batch = Batch(ids, np.roll(ids, -1, 1), ones, ones.astype(np.float32))
    transform = Optimizer().build(parameters(config))
    structure, state, _ = create_state(config, transform, seed=0)
    began = time.perf_counter()
    step = make_train_step(structure, transform, np.ones(config.vocab, np.int32)).lower(state, batch, RATE).compile()
    compiled = time.perf_counter() - began

    seconds, theirs = [], []
    for i in range(FLAGS.steps + 1):
        began = time.perf_counter()
        state, metrics = step(state, batch, RATE)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - began)
        if peer:
            theirs.append(peer.train_step(B, T))
    speed = B * T / statistics.median(seconds[1:])
    mfu = speed * profile(config, T).training.matmul / peak_flops(config.dtype or "float32")
    if mfu > 1:
        raise ValueError(f"{name}: an MFU of {mfu:.0%} cannot be: the measurement went wrong; run it again")
    row = {"model": name, "what": f"train {B} x {T}", "tokens_per_second": speed, "mfu": mfu,
           "compile_seconds": compiled, "memory_MB": memory(step) / 1e6}
    if peer:
        row |= {"peer_tokens_per_second": B * T / statistics.median(theirs[1:])}
        row["ratio"] = speed / row["peer_tokens_per_second"]
    return row


def prefill_row(name: str, config, context: int, peer) -> dict:
    """Median speed of reading one prompt into an empty cache, with the last token's logits."""
    import jax
    from flax import nnx

    from archlab.analysis.accounts import profile
    from archlab.training.metrics import peak_flops

    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    read = jax.jit(lambda model, ids: model(ids, model.init_state(1, context), logits="last")[:2])
    ids = jax.random.randint(jax.random.key(0), (1, context), 0, config.vocab)
    seconds, theirs = [], []
    for _ in range(2 * FLAGS.repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(read(model, ids))
        seconds.append(time.perf_counter() - began)
        theirs += [peer.prefill(1, context)] if peer else []
    speed = context / statistics.median(seconds[1:])
    flops = profile(config, context).forward.matmul - 2 * config.width * config.vocab  # the head has one token only
    row = {"model": name, "what": f"prefill 1 x {context:,}", "tokens_per_second": speed,
           "mfu": speed * flops / peak_flops(config.dtype or "float32"),
           "compile_seconds": seconds[0] - statistics.median(seconds[1:])}
    if peer:
        row |= {"peer_tokens_per_second": context / statistics.median(theirs[1:])}
        row["ratio"] = speed / row["peer_tokens_per_second"]
    return row


def generation_row(name: str, config, batch: int, context: int, peer) -> dict:
    """Median time to the first token and of each further one, greedy; tokens a second of all rows together."""
    import jax
    from flax import nnx

    from archlab.analysis.accounts import state_bytes
    from archlab.inference.timing import time_generation

    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    ours, theirs = [], []
    for _ in range(FLAGS.repeats):
        ours.append(time_generation(model, context, FLAGS.new_tokens, batch, repeats=1))
        theirs += [peer.generate(batch, context, FLAGS.new_tokens)] if peer else []
    first, each = (statistics.median(getattr(t, field) for t in ours) for field in ("first_token", "per_token"))
    row = {"model": name, "what": f"decode {batch} after {context:,}", "tokens_per_second": batch / each,
           "compile_seconds": ours[0].compile, "TTFT_ms": 1e3 * first, "TPOT_ms": 1e3 * each,
           "memory_MB": state_bytes(config, context + FLAGS.new_tokens, batch) / 1e6}
    if peer:
        their_first, their_each = (statistics.median(column) for column in zip(*theirs))
        row |= {"peer_tokens_per_second": batch / their_each, "ratio": their_each / each,
                "TTFT_ratio": their_first / first}
    return row


def format_cell(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    common.run(main)
