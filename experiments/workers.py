"""Work shared out by index: to processes of this machine, each on its share of the cores, or to several machines."""

import contextlib
import os
import signal
import subprocess
import sys

from absl import flags

from experiments import common


def define_workers() -> None:
    """The flags `--workers` and `--shard`."""
    flags.DEFINE_integer("workers", 1, "Processes that share the work, on as many parts of the machine's cores.")
    flags.DEFINE_string("shard", "0/1", "I/N: this process does the I-th of N parts of the work, from 0, for arrays\n"
                        "of jobs and several machines.")


def shard_of(text: str) -> tuple[int, int]:
    """(I, N) of "I/N"; ValueError for anything else."""
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise ValueError(f"--shard = {text}: must be I/N with I below N, as 0/4")
    return int(first), int(count)


def share(module: str, shard: int, shards: int, workers: int) -> None:
    """Runs `python -m module` with this process's flags in `workers` processes, each on its shard of this one's; ends
    this process where one of them fails. What ends this process (SIGTERM, Ctrl-C) is passed on to them, and waited
    for: they save what they have."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    command, running = [sys.executable, "-m", module, *sys.argv[1:], "--workers=1"], []
    try:
        for i in range(workers):
            flag = f"--shard={shard + shards * i}/{shards * workers}"
            with cores(i, workers):  # which a process begun here inherits
                running.append(subprocess.Popen([*command, flag]))
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    if any(codes):
        common.leave("a worker failed; what it said stands above, and the same command goes on", max(codes))


@contextlib.contextmanager
def cores(i: int, count: int):
    """Keeps this thread, and what it begins, to the i-th of `count` shares of its cores, where that can be (Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[i::count] or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
