"""Trains one model on one corpus, and goes on where it stopped when called again.

    python -m experiments.train --model=transformer-tiny --steps=200 --out=runs/transformer

Writes under --out: metrics.jsonl (a line per logged step), config.json, checkpoints, TensorBoard's files; of a model
whose routing looks ahead in training, look_ahead.json: the losses with and without, and how far the routings agree.
Exit codes: 0 done; 2 bad input; 3 diverged (the last good checkpoint stays); 75 interrupted by SIGTERM or Ctrl-C, all
saved: the same command goes on.

Expected: transformer-tiny (1.2 M parameters) after 200 steps of 8 x 256 bytes of stdlib has about 2.8 bits per byte on
the first 20 validation batches, from 8.7 at the start. Cost: 0.4 M tokens,
3 minutes on four CPU cores that also did other work.
"""

import contextlib
import json
from pathlib import Path

from absl import flags

from experiments import common

FLAGS = flags.FLAGS

flags.DEFINE_string("model", "transformer-tiny", "A name of the zoo, or a Python file of yours with a CONFIG.")
flags.DEFINE_multi_string("set", [], "path=value: changes a field of the model's config, as body.n=4. Repeatable.")
flags.DEFINE_string("data", "stdlib", "The corpus: stdlib, text:GLOB or tfds:NAME[/CONFIG].")
flags.DEFINE_string("tokenizer", "bytes", "bytes, bpe:VOCAB or the path of a tokenizer.json.")
flags.DEFINE_integer("steps", 200, "Steps in all, those of earlier calls included.")
flags.DEFINE_integer("batch", 8, "Rows a step, over all devices.")
flags.DEFINE_integer("context", 256, "Tokens a row.")
flags.DEFINE_integer("accumulate", 1, "Micro-batches a step.")
flags.DEFINE_integer("seed", 0, "Of the weights, the order of the data and dropout.")
flags.DEFINE_string("optimizer", "adamw", "adamw, muon or adafactor.")
flags.DEFINE_float("learning_rate", 3e-3, "At its peak.")
flags.DEFINE_string("schedule", "cosine", "cosine, wsd (warm-up, stable, decay) or constant.")
flags.DEFINE_float("warmup", 0.05, "Share of the steps in which the learning rate rises.")
flags.DEFINE_float("weight_decay", 0.1, "Of parameters that want to be small.")
flags.DEFINE_string("dtype", None, "Compute dtype: bfloat16 or float32; parameters stay in float32.")
flags.DEFINE_string("mesh", None, "Devices by axis, as data:2,fsdp:4; axes data, fsdp, expert, tensor. All on data.")
flags.DEFINE_string("out", "runs/train", "The folder of the run.")
flags.DEFINE_integer("log_every", 10, "Steps between logged rows.")
flags.DEFINE_integer("eval_every", 100, "Steps between evaluations; 0 for one at the end.")
flags.DEFINE_integer("eval_batches", 20, "Validation batches an evaluation reads; 0 for all.")
flags.DEFINE_integer("checkpoint_every", 100, "Steps between checkpoints; 0 for one at the end.")
flags.DEFINE_integer("keep", 2, "Newest checkpoints to keep.")
flags.DEFINE_string("branch_from", None, "The folder of a shorter run with --schedule=wsd, as many warm-up steps, and\n"
                    "else the same settings: go on from where its learning rate began to fall.")
flags.DEFINE_string("wandb", None, "A project of Weights & Biases to log to as well.")
common.define_processes()


def main() -> None:
    common.join_processes()
    import jax  # after joining: what touches a device must not come before

    from archlab.analysis.accounts import profile
    from archlab.data import load_corpus, tokenizer_from, validation_batches
    from archlab.parallel.mesh import make_mesh, process_share
    from archlab.training.look_ahead import look_ahead, make_look_ahead_step
    from archlab.training.loop import Run, train
    from archlab.training.optimizers import Optimizer
    from archlab.training.recorder import Diverged

    model = common.model_config(FLAGS.model, FLAGS.set, FLAGS.dtype)
    optimizer = Optimizer(FLAGS.optimizer, FLAGS.learning_rate, FLAGS.schedule, warmup=FLAGS.warmup,
                          weight_decay=FLAGS.weight_decay)
    run = Run(model, FLAGS.steps, FLAGS.batch, FLAGS.context, FLAGS.data, FLAGS.tokenizer, FLAGS.seed,
              FLAGS.accumulate, optimizer)
    common.same_code(Path(FLAGS.out), FLAGS.model)
    mesh = make_mesh(FLAGS.mesh) if FLAGS.mesh or jax.device_count() > 1 else None
    corpus = load_corpus(run.data)
    tokenizer = tokenizer_from(run.tokenizer, corpus)
    try:
        result = train(run, corpus, tokenizer, out=FLAGS.out, mesh=mesh, name=FLAGS.model, log_every=FLAGS.log_every,
                       eval_every=FLAGS.eval_every, eval_batches=FLAGS.eval_batches or None,
                       checkpoint_every=FLAGS.checkpoint_every, keep=FLAGS.keep, branch_from=FLAGS.branch_from,
                       wandb=FLAGS.wandb,
                       flops_per_token=profile(model, FLAGS.context).training.matmul)
    except Diverged as error:
        common.leave(f"{FLAGS.model} {error}", code=3)
    ahead = None
    if model.body.looks_ahead:
        share = (0, 1) if mesh is None else process_share(mesh)
        held_out = validation_batches(corpus, tokenizer, run.context, run.batch, FLAGS.eval_batches or None, *share)
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            ahead = look_ahead(make_look_ahead_step(model, tokenizer.bytes_per_token), result.state.params,
                               result.state.rest, held_out, mesh)
    if jax.process_index() == 0:
        if ahead is not None:
            print(ahead)
            (Path(FLAGS.out) / "look_ahead.json").write_text(json.dumps(ahead.as_dict(), indent=1))
        print(f"{FLAGS.model}: validation {result.evaluation.bits_per_byte:.3f} bits/byte, "
              f"{result.tokens_per_second:,.0f} tokens/s, in {FLAGS.out}\n"
              f"next: python -m experiments.generate --checkpoint={FLAGS.out}{common.code_flag(FLAGS.model)} "
              "--prompt='def '")


if __name__ == "__main__":
    common.run(main)
