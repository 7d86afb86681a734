"""The training loop."""

import contextlib
import dataclasses
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from archlab.data import Batch, Corpus, Symbols, load_corpus, tokenizer_from, train_batches, validation_batches
from archlab.layers.config import Config, require
from archlab.layers.weights import merge
from archlab.model import LanguageModel, Model
from archlab.parallel.mesh import batch_sharding, global_batch, process_share
from archlab.training.evaluation import Evaluation, evaluate, make_evaluate_step
from archlab.training.metrics import Journal, peak_flops
from archlab.training.optimizers import Optimizer
from archlab.training.progress import Progress
from archlab.training.recorder import Recorder
from archlab.training.step import TrainState, create_state, make_train_step, parameters


class Run(Config):
    """All that decides the numbers of a run.

    data, tokenizer: as `load_corpus` and `tokenizer_from` take them. batch: rows a step, of `context` tokens each, over
    all devices. accumulate: micro-batches a step. seed: of the weights, the order of the data and the training form.
    """

    model: LanguageModel
    steps: int
    batch: int
    context: int
    data: str = "stdlib"
    tokenizer: str = "bytes"
    seed: int = 0
    accumulate: int = 1
    optimizer: Optimizer = Optimizer()

    def __post_init__(self):
        for field in ("steps", "batch", "context", "accumulate"):
            require(getattr(self, field) >= 1, self, field, "must be at least 1")
        require(self.seed >= 0, self, "seed", "must be 0 or more")
        require(self.batch % self.accumulate == 0, self, "accumulate", f"must divide the batch of {self.batch} rows")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves.

    history: one dict per logged step, as in metrics.jsonl (step, loss, bits_per_byte, grad_norm, tokens, seconds,
    tokens_per_second, learning_rate, where evaluated validation_loss, validation_bits_per_byte, and with experts
    max_violation, largest_logit).
    evaluation: after the last step. compile_seconds: of the step. tokens_per_second: median, without compilation.
    """

    run: Run
    structure: nnx.GraphDef
    state: TrainState
    history: list[dict]
    evaluation: Evaluation
    compile_seconds: float
    tokens_per_second: float

    @property
    def model(self) -> Model:
        return merge(self.structure, self.state.params, self.state.rest)


class Interrupted(SystemExit):
    """SIGTERM or Ctrl-C: all is saved and the same call goes on from there. Uncaught, the process exits with 75."""

    def __init__(self, step: int):
        super().__init__(75)  # EX_TEMPFAIL of sysexits.h: try again
        self.step = step


def train(run: Run, corpus: Corpus | None = None, tokenizer=None, *, out: str | Path | None = None, mesh=None,
          name: str = "training", log_every: int = 10, eval_every: int = 0, eval_batches: int | None = 20,
          checkpoint_every: int = 0, keep: int = 2, flops_per_token: float | None = None, tensorboard: bool = True,
          wandb: str | None = None, collapse_after: int = 100, quiet: bool = False) -> Result:
    """Trains a model, or goes on where an earlier call with the same `run` and `out` stopped.

    Args:
      corpus, tokenizer: what `run.data` and `run.tokenizer` name, where they are at hand.
      out: a folder for metrics.jsonl, of models with experts also experts.jsonl, config.json, TensorBoard's files and
        checkpoints; None writes nothing.
      mesh: from `make_mesh`; None for one device.
      eval_every, checkpoint_every: in steps; 0 for once, after the last. eval_batches: of validation, None for all.
      flops_per_token: of training, to show the MFU. collapse_after: steps for which an expert must starve before a
        warning names it (`archlab.training.collapse`).

    Raises:
      ValueError: settings that do not fit one another, or a folder with checkpoints of another run.
      Diverged: a loss that is not finite, or has grown beyond a guess; nothing of it is saved.
      Interrupted: after SIGTERM or Ctrl-C, when all is saved.
    """
    corpus = load_corpus(run.data) if corpus is None else corpus
    tokenizer = tokenizer_from(run.tokenizer, corpus) if tokenizer is None else tokenizer
    if tokenizer.vocab > run.model.vocab:
        raise ValueError(f"the tokenizer {run.tokenizer!r} has {tokenizer.vocab} tokens, more than the model's "
                         f"vocab = {run.model.vocab}; set vocab={tokenizer.vocab}")
    share = (0, 1) if mesh is None else process_share(mesh)
    place = (lambda batch: batch) if mesh is None else (lambda batch: global_batch(batch, mesh))
    batches = train_batches(corpus, tokenizer, run.context, run.batch, run.seed, *share)
    held_out = validation_batches(corpus, tokenizer, run.context, run.batch, eval_batches, *share)
    # before the mesh is entered: this one is measured on a single device
    peak = flops_per_token and peak_flops(run.model.dtype or "float32") / flops_per_token

    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        transform = run.optimizer.build(parameters(run.model), run.steps)
        structure, state, shardings = create_state(run.model, transform, run.seed, mesh)
        checkpoints, journal, start, seconds = None, None, 0, 0.0
        if out is not None:
            from archlab.training.checkpoints import Checkpoints  # late: orbax takes most of a second

            checkpoints = Checkpoints(Path(out) / "checkpoints", keep)
            stack.callback(checkpoints.close)
            restored = checkpoints.restore(state, run)
            if restored is not None:
                state, seconds, start = restored.state, restored.seconds, int(restored.state.step)
                batches.set_state(restored.data)
            if jax.process_index() == 0:
                journal = Journal(out, start, tensorboard, wandb, run.to_json())
                stack.callback(journal.close)
                (Path(out) / "config.json").write_text(run.to_json())

        began = time.perf_counter()
        step_function = make_train_step(structure, transform, tokenizer.bytes_per_token, seed=run.seed,
                                        accumulate=run.accumulate, shardings=shardings)
        train_step = step_function.lower(state, _shapes(run, mesh)).compile()  # no step ever compiles again
        compile_seconds = time.perf_counter() - began
        evaluate_step = make_evaluate_step(structure, tokenizer.bytes_per_token)

        unit = "bits/answer" if isinstance(tokenizer, Symbols) else "bits/byte"
        progress = Progress(name, run.steps, start, quiet or jax.process_index() > 0, unit)
        stack.callback(progress.close)
        if start:
            progress.say(f"going on after step {start} of {run.steps} in {out}")
        stop = stack.enter_context(_signals())
        recorder = Recorder(steps=run.steps, tokens_per_step=run.batch * run.context, vocab=run.model.vocab,
                            rate=run.optimizer.rate(run.steps), log_every=log_every, seconds=seconds,
                            progress=progress, journal=journal, peak_tokens_per_second=peak,
                            collapse_after=collapse_after)
        evaluation = None
        for step in range(start + 1, run.steps + 1):
            state, metrics = train_step(state, place(next(batches)))  # returns at once; the device works on
            recorder.add(step, metrics)
            last = step == run.steps
            stopping = _agreed(stop, step % log_every == 0)
            evaluating = last or bool(eval_every) and step % eval_every == 0
            saving = last or stopping or bool(checkpoint_every) and step % checkpoint_every == 0
            if evaluating or saving:
                recorder.settle()  # a state that is not finite is never saved
                if evaluating:
                    evaluation = evaluate(evaluate_step, state.params, state.rest, held_out, mesh)
                    recorder.commit(validation_loss=evaluation.loss,
                                    validation_bits_per_byte=evaluation.bits_per_byte)
                recorder.commit()
                if saving and checkpoints is not None:
                    checkpoints.save(step, state, batches.get_state(), run, recorder.seconds)
                recorder.start_clock()
            if stopping and not last:
                progress.say(f"interrupted: step {step} is saved, the same command goes on from there" if checkpoints
                             else f"interrupted after step {step}; nothing was to be saved")
                raise Interrupted(step)
        if evaluation is None:  # all steps had been taken before
            evaluation = evaluate(evaluate_step, state.params, state.rest, held_out, mesh)
        return Result(run, structure, state, recorder.rows, evaluation, compile_seconds, recorder.tokens_per_second)


def _shapes(run: Run, mesh) -> Batch:
    sharding = None if mesh is None else batch_sharding(mesh)
    of = lambda dtype: jax.ShapeDtypeStruct((run.batch, run.context), dtype, sharding=sharding)
    return Batch(of(jnp.int32), of(jnp.int32), of(jnp.int32), of(jnp.float32))


@contextlib.contextmanager
def _signals():
    """A list that fills when SIGTERM or SIGINT comes; a second one does what it does elsewhere."""
    came, before = [], {}

    def note(number, frame):
        came.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agreed(stop: list, due: bool) -> bool:
    """Whether to stop. Several processes must do so after the same step: they ask one another when it is `due`."""
    if jax.process_count() == 1:
        return bool(stop)
    return due and bool(multihost_utils.process_allgather(np.array(bool(stop))).any())
