"""What the README says is run: its Python, its own architecture in one file, and its commands (made small)."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^python .*$", "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)), re.MULTILINE)
OWN = next(block for block in PYTHON if "class Average(" in block)
SMALL = {  # flags that make a command small; what comes last wins
    "train": "--steps=3 --batch=2 --context=32 --eval_batches=1",
    "generate": "--max_new_tokens=5",
    "evaluate": "--batches=1",
    "compare": "--match=params --tokens=700 --batch=2 --context=32 --eval_batches=1",
    "convert": "",
    "attention": "--lengths=128,256 --forms=full,window,jax,bigbird --repeats=1",
    "extrapolate": "--methods=rope,alibi",
    "inspect": "--rows=1 --context=64",
    "sharding": "--batch=8 --context=16 --steps=1 --meshes=data:2,expert:4",
    "moe_ablation": "--studies=collapse",
    "tasks": "--models=attention --tasks=parity-tiny --widths=16 --steps=2",
    "recurrence": "--lengths=40 --repeats=1 --heads=2 --groups=1 --keys=8 --values=8",
    "recursion": "--parts=cache,decode --width=64 --blocks=1 --new_tokens=4",
    "depth": "--studies=a --seeds=1",
    "scaling": "--models=transformer-nano --sizes=6e3,1.2e4,2.4e4 --budgets=6e9,1.2e10,2.4e10 --window=0.001,1000 "
               "--context=32 --eval_rows=32 --repetitions=10",
    "transfer": "",
    "bench": "--batch=1 --context=32 --steps=1 --contexts=32 --new_tokens=4 --repeats=1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the README's own architecture and links to the project, in which commands run in order."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "average.py").write_text(OWN)
    return folder


def run(arguments, folder, **more):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an activated environment
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": path}
    return subprocess.run(arguments, cwd=folder, env=environment, text=True, capture_output=True, timeout=600, **more)


@pytest.mark.parametrize("code", [c for c in PYTHON if c != OWN], ids=lambda code: code.split("\n")[0])
def test_python(folder, code):
    done = run([sys.executable, "-c", code], folder)
    assert done.returncode == 0, done.stderr


def test_there_are_commands():
    shown = {command.split("-m ")[1].split()[0] for command in COMMANDS}
    assert shown >= {f"experiments.{name}" for name in SMALL} | {"launch.local"}


@pytest.mark.xdist_group("readme")  # in their order: a later command uses what an earlier one left
@pytest.mark.parametrize("command", COMMANDS)
def test_command(folder, command):
    if "pytest" in command:
        command = command.replace("tests/", f"{ROOT}/tests/")
        done = run([sys.executable, *shlex.split(command)[1:], "-n", "0", "-k", "mixed or packed or fixed"], folder)
        assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
        return
    name = re.findall(r"experiments\.(\w+)", command)[-1]
    if name == "compare" and "--models" not in command:
        command += " --models=transformer-nano,mamba-nano"
    command = command.replace("-tiny", "-nano").replace("-small", "-nano")
    done = run([sys.executable, *shlex.split(command)[1:], *SMALL[name].split()], folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_own_architecture_keeps_the_contract(folder):
    """The toy of the README passes the law of splits and of documents: readers will copy it."""
    code = OWN + """
ids = jax.random.randint(jax.random.key(0), (2, 20), 0, 256)
model = CONFIG.build(nnx.Rngs(0))
whole = model(ids).logits
state, outs = model.init_state(2, 20), []
for piece in (slice(0, 7), slice(7, 8), slice(8, 20)):
    out = model(ids[:, piece], state)
    state, outs = out.state, outs + [out.logits]
assert jnp.abs(jnp.concatenate(outs, 1) - whole).max() < 1e-4
segments = jnp.where(jnp.arange(20) < 9, 1, 2) * jnp.ones((2, 1), int)
packed = model(ids, segment_ids=segments).logits
assert jnp.abs(packed[:, 9:] - model(ids[:, 9:]).logits).max() < 1e-4
"""
    done = run([sys.executable, "-c", code], folder)
    assert done.returncode == 0, done.stderr
