"""The local launcher: exit codes, signals, and two processes that train as one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-c"]


def start(*command, processes=2, **options) -> subprocess.Popen:
    flags = [f"--processes={processes}", *(f"--{name}={value}" for name, value in options.items())]
    return subprocess.Popen([sys.executable, "-m", "launch.local", *flags, "--", *command], cwd=ROOT, text=True,
                            env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def test_each_process_gets_its_flags_and_a_prefix():
    process = start(*PYTHON, "import os, sys; print(*sys.argv[1:], os.environ['XLA_FLAGS'])", "--model=x",
                    processes=3, devices_per_process=2)
    lines, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    for i, line in enumerate(sorted(lines.splitlines())):
        words = line.split()
        assert words[:3] == [f"[{i}]", "--model=x", "--distributed"] and words[3].startswith("--coordinator=localhost:")
        assert words[4:6] == ["--processes=3", f"--process_id={i}"]
        assert words[-1] == "--xla_force_host_platform_device_count=2"
    assert len({line.split()[3] for line in lines.splitlines()}) == 1  # one coordinator


def test_one_failure_ends_all():
    began = time.monotonic()
    process = start(*PYTHON, "import sys, time; time.sleep(60) if sys.argv[-1] == '--process_id=0' else sys.exit(7)")
    lines, _ = process.communicate(timeout=50)
    assert process.returncode == 7 and "[1] ended with exit code 7" in lines
    assert time.monotonic() - began < 40


def test_a_signal_reaches_every_process():
    process = start(*PYTHON, "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
                             "print('up'); time.sleep(60)")
    for _ in range(2):
        assert process.stdout.readline().endswith("up\n")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=50)
    assert process.returncode == 75


def test_bad_input_is_refused():
    for options in (dict(processes=0), dict(devices_per_process=0)):
        process = start("true", **options)
        lines, _ = process.communicate(timeout=60)
        assert process.returncode == 2 and "1 or more processes" in lines
    process = start("no-such-program")
    assert "no-such-program" in process.communicate(timeout=60)[0] and process.returncode == 2


def test_two_processes_train_as_one(tmp_path):
    """The same losses in training and validation, within 1e-5."""
    (tmp_path / "text.txt").write_text("".join(f"{i} squared is {i * i}, as everyone knows.\n" for i in range(400)))
    command = [sys.executable, "-m", "experiments.train", "--model=transformer-nano", "--steps=4", "--batch=4",
               "--context=16", f"--data=text:{tmp_path}/text.txt", "--log_every=1", "--eval_batches=2"]
    alone = subprocess.run([*command, f"--out={tmp_path}/one"], cwd=ROOT, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    process = start(*command, f"--out={tmp_path}/two", devices_per_process=1)
    lines, _ = process.communicate(timeout=300)
    assert process.returncode == 0, lines
    read = lambda name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    one, two = read("one"), read("two")
    assert [row["step"] for row in two] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([row[key] for row in two], [row[key] for row in one], rtol=0, atol=1e-5)
    assert abs(one[-1]["validation_loss"] - two[-1]["validation_loss"]) < 1e-5
