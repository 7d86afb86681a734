"""What the experiments share: models by name or file, `--set`, processes, and errors without tracebacks."""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from archlab.layers.config import near
from archlab.model import LanguageModel
from archlab.zoo import get_config


_own_files: set[str] = set()  # files of the user's that were run: errors in them are told with their line


def define_processes() -> None:
    """The flags of a run over several processes; `launch.local` fills them in."""
    flags.DEFINE_bool("distributed", False, "Join other processes (jax.distributed); on a pod the rest is found out.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where it cannot be found out.")
    flags.DEFINE_integer("processes", None, "How many processes there are, where it cannot be found out.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def join_processes() -> None:
    """Joins the other processes if `--distributed` asks for it. Call it before anything touches a device."""
    import jax

    if flags.FLAGS.distributed:
        jax.distributed.initialize(flags.FLAGS.coordinator, flags.FLAGS.processes, flags.FLAGS.process_id)


def define_checkpoint() -> None:
    """The flags that name a trained model."""
    flags.DEFINE_string("checkpoint", None, "The folder of a training run, or of archlab.save.")
    define_code()


def define_code() -> None:
    """The flag for the configs of one's own that a folder names."""
    flags.DEFINE_multi_string("code", [], "A Python file of yours whose configs the checkpoint names. Repeatable.")


def load_checkpoint(folder: str, **how):
    """The model in a folder, after running the files of `--code`; a checkpoint itself never runs anything. how: dtype
    and mesh, as for `archlab.load`."""
    import archlab

    for path in flags.FLAGS.code:
        run_file(Path(path))
    return archlab.load(folder, **how)


def model_config(model: str, changes: list[str], dtype: str | None = None) -> LanguageModel:
    """The config that `--model`, `--set` and `--dtype` describe.

    Args: model: a name of the zoo, or a Python file with a `CONFIG` (it is run: use files of your own). changes:
      "path=value" each, as in "body.n=4". dtype: of the computation, None for the config's own.
    """
    if model.endswith(".py"):
        config = _config_of_file(Path(model))
        _check_state(config)
    else:
        config = get_config(model)
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change!r}: it must be path=value, as in body.n=4")
        try:
            config = config.set(path, value)
        except ValueError as error:  # its traceback leads to the line of a file of one's own
            raise ValueError(f"--set {change} of {model}: {error}").with_traceback(error.__traceback__) from None
    return config.set("dtype", dtype) if dtype else config


def name_of(model: str) -> str:
    """What a model is called in tables: a file goes by its name without folder and `.py`."""
    return Path(model).stem if model.endswith(".py") else model


def named(models: list[str], known) -> dict[str, str]:
    """{name: model}. ValueError where two have one name, or a file has that of a `known` model."""
    found = {}
    for model in models:
        name = name_of(model)
        if name in found:
            raise ValueError(f"--models has {found[name]} and {model}, both named {name}: give each a name of its own")
        if name != model and name in known:
            raise ValueError(f"{model} has the name of the known model {name}: rename the file")
        found[name] = model
    return found


def run(main: Callable[[], None]) -> None:
    """Parses flags and calls `main`. Bad input ends with its message and exit code 2, without a traceback."""
    def parse(argv):
        for module, shared in flags.FLAGS.flags_by_module_dict().items():
            for flag in shared if module.startswith("experiments.") else ():  # --help shows what they share, too
                flags.FLAGS.register_key_flag_for_module(argv[0], flag)
        try:
            rest = flags.FLAGS(argv)
        except flags.UnrecognizedFlagError as error:
            leave(f"there is no flag --{error.flagname}; {near(error.flagname, _own_flags(argv[0]))}")
        except flags.Error as error:
            leave(str(error))
        if len(rest) > 1:
            leave(f"{rest[1]!r} is no flag; flags are written --name=value")
        return rest

    def guarded(_):
        logging.set_verbosity(logging.WARNING)
        try:
            main()
        except KeyboardInterrupt:
            leave("interrupted; what is finished is kept, and the same command goes on", 75)
        except Exception as error:
            own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in _own_files]
            if flags.FLAGS.debug or not (own or isinstance(error, ValueError)):
                raise
            place = f"\n  in {own[-1].filename}, line {own[-1].lineno}: {own[-1].line}" if own else ""
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            leave(f"{kind}{error}{place}")

    flags.DEFINE_bool("debug", False, "Show the traceback of an error in the input.")
    app.run(guarded, flags_parser=parse)


def leave(message: str, code: int = 2) -> NoReturn:
    """Ends the process with a message and an exit code."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def same_code(folder: Path, model: str) -> None:
    """ValueError where `folder` holds a run of a file of one's own that has changed since; notes the file where it is
    new. Configs are compared elsewhere: this is about the code that they name."""
    if not model.endswith(".py"):
        return
    note, now = folder / "code.sha256", hashlib.sha256(Path(model).read_bytes()).hexdigest()
    if note.is_file() and note.read_text() != now:
        raise ValueError(f"{model} has changed since the run in {folder}: give another --out, or remove that folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(now)


def code_flag(model: str) -> str:
    """What a command that reads a checkpoint of this model needs beside it."""
    return f" --code={model}" if model.endswith(".py") else ""


def _config_of_file(path: Path) -> LanguageModel:
    module = run_file(path)
    config = getattr(module, "CONFIG", None)
    if not isinstance(config, LanguageModel):
        zoo = "; it has CONFIGS: in archlab/zoo/ its models go by their names" if hasattr(module, "CONFIGS") else ""
        raise ValueError(f"{path} must define CONFIG, a LanguageModel{zoo}")
    return config


def _check_state(config: LanguageModel) -> None:
    """ValueError where a call does not give back a state like the one of `init_state`: no text could be generated."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    model = nnx.eval_shape(lambda: config.build(nnx.Rngs(0)))
    before = jax.eval_shape(lambda m: m.init_state(1, 8), model)
    after = jax.eval_shape(lambda m, s: m(jnp.zeros((1, 4), jnp.int32), s).state, model, before)
    listed = lambda state: {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
                            for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    before, after = listed(before), listed(after)
    for path in before | after:
        if before.get(path) != after.get(path):
            raise ValueError(f"the state {path} is {before.get(path)} from init_state and {after.get(path)} after a "
                             "call: they must be the same (a layer that remembers defines init_state)")


def run_file(path: Path):
    """The module of a Python file of the user's; errors in it are told with their line."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    _own_files.add(str(path))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _own_flags(program: str) -> list[str]:
    return [flag.name for flag in flags.FLAGS.get_key_flags_for_module(program)] or list(flags.FLAGS)
