"""The training loop."""

import contextlib
import dataclasses
import signal
import threading
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from archlab.data import Corpus, Symbols, load_corpus, tokenizer_from, train_batches, validation_batches
from archlab.layers.weights import merge
from archlab.model import Model
from archlab.parallel.mesh import global_batch, process_share
from archlab.training.evaluation import Evaluation, evaluate
from archlab.training.metrics import Journal, peak_flops
from archlab.training.programs import Programs
from archlab.training.progress import Progress
from archlab.training.recorder import Recorder
from archlab.training.run import Run
from archlab.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves.

    history: one dict per logged step, as in metrics.jsonl (step, loss, bits_per_byte, grad_norm, tokens, seconds,
    tokens_per_second, learning_rate, where evaluated validation_loss, validation_bits_per_byte, and with experts
    max_violation, largest_logit).
    evaluation: after the last step. compile_seconds: of the step, 0 where it was compiled before. tokens_per_second:
    median, without compilation.
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
          checkpoint_every: int = 0, keep: int = 2, branch_from: str | Path | None = None,
          programs: Programs | None = None, flops_per_token: float | None = None, tensorboard: bool = True,
          wandb: str | None = None, collapse_after: int = 100, quiet: bool = False) -> Result:
    """Trains a model, or goes on where an earlier call with the same `run` and `out` stopped.

    Args:
      corpus, tokenizer: what `run.data` and `run.tokenizer` name, where they are at hand.
      out: a folder for metrics.jsonl, of models with experts also experts.jsonl, config.json, TensorBoard's files and
        checkpoints; None writes nothing.
      mesh: from `make_mesh`; None for one device.
      eval_every, checkpoint_every: in steps; 0 for once, after the last. eval_batches: of validation, None for all.
      keep: so many of the newest checkpoints stay. With the schedule "wsd" that of where the rate begins to fall is
        written and stays, too, for longer runs to branch off from (arXiv:2405.18392).
      branch_from: the folder of a run that began as this one: where `out` is new, this one goes on from the newest of
        its checkpoints up to which both had the same learning rates, and gives what it would give alone.
      programs: compiled before, for this run or one that differs in learning rate, schedule, steps or seed.
      flops_per_token: of training, to show the MFU. collapse_after: steps for which an expert must starve before a
        warning names it (`archlab.training.collapse`).

    Raises:
      ValueError: settings that do not fit one another, or a folder with checkpoints of another run; `branch_from`
        where no checkpoint can be gone on from.
      Diverged: a loss that is not finite, or has grown beyond a guess; nothing of it is saved.
      Interrupted: after SIGTERM or Ctrl-C, when all is saved.
    """
    if branch_from is not None and (out is None or not (Path(branch_from) / "checkpoints").is_dir()):
        raise ValueError(f"branch_from = {branch_from}: must be the folder of a run, and `out` one of this run's own")
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
        compiling = programs is None
        if compiling:
            programs = Programs(run, tokenizer.bytes_per_token, mesh)
        programs.check(run, tokenizer.bytes_per_token, mesh)
        state, rate = programs.create(run.seed), run.optimizer.rate(run.steps)
        checkpoints, journal, start, seconds = None, None, 0, 0.0
        if out is not None:
            from archlab.training.checkpoints import Checkpoints  # late: orbax takes most of a second

            checkpoints = Checkpoints(Path(out) / "checkpoints", keep, run.branches_at)
            stack.callback(checkpoints.close)
            restored = checkpoints.restore(state, run)
            begun = restored is not None
            if restored is None and branch_from is not None:
                with contextlib.closing(Checkpoints(Path(branch_from) / "checkpoints")) as others:
                    restored = others.branch(state, run)
            if restored is not None:
                state, seconds, start = restored.state, restored.seconds, int(restored.state.step)
                batches.set_state(restored.data)
            if jax.process_index() == 0:
                journal = Journal(out, start, tensorboard, wandb, run.to_json())
                stack.callback(journal.close)
                (Path(out) / "config.json").write_text(run.to_json())

        unit = "bits/answer" if isinstance(tokenizer, Symbols) else "bits/byte"
        progress = Progress(name, run.steps, start, quiet or jax.process_index() > 0, unit)
        stack.callback(progress.close)
        if start:
            progress.say(f"going on after step {start} of {run.steps} in {out}" if begun else
                         f"branching off after step {start} of {branch_from}")
        stop = stack.enter_context(_signals())
        recorder = Recorder(steps=run.steps, tokens_per_step=run.batch * run.context, vocab=run.model.vocab,
                            rate=rate, log_every=log_every, seconds=seconds,
                            progress=progress, journal=journal, peak_tokens_per_second=peak,
                            collapse_after=collapse_after)
        evaluation = None
        for step in range(start + 1, run.steps + 1):
            # returns at once; the device works on
            state, metrics = programs.step(state, place(next(batches)), rate(step - 1), run.seed)
            recorder.add(step, metrics)
            last = step == run.steps
            stopping = _agreed(stop, step % log_every == 0)
            evaluating = last or bool(eval_every) and step % eval_every == 0
            saving = (last or stopping or step == run.branches_at
                      or bool(checkpoint_every) and step % checkpoint_every == 0)
            if evaluating or saving:
                recorder.settle()  # a state that is not finite is never saved
                if evaluating:
                    evaluation = evaluate(programs.evaluate, state.params, state.rest, held_out, mesh)
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
            evaluation = evaluate(programs.evaluate, state.params, state.rest, held_out, mesh)
        return Result(run, programs.structure, state, recorder.rows, evaluation,
                      programs.compile_seconds if compiling else 0.0, recorder.tokens_per_second)


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
