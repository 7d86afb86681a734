"""Work shared out by index: to processes of this machine, each on its share of the cores, or to several machines."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from experiments import common


def define_workers() -> None:
    """The flags `--workers` and `--shard`."""
    flags.DEFINE_integer("workers", 1, "Processes that share the work, on as many parts of the machine's cores.")
    flags.DEFINE_string("shard", "0/1", "I/N: this process does the I-th of N parts of the work, from 0, for arrays\n"
                        "of jobs and several machines.")
    flags.DEFINE_bool("part", False, "Of processes that another one began to share its work.")


def shard_of(text: str) -> tuple[int, int]:
    """(I, N) of "I/N"; ValueError for anything else."""
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise ValueError(f"--shard = {text}: must be I/N with I below N, as 0/4")
    return int(first), int(count)


def share(module: str, shard: int, shards: int, workers: int, costs: Sequence[float]) -> None:
    """Runs `python -m module` with this process's flags for each part of this shard's work, `workers` at a time, each
    on its share of the cores; ends this process where one of them fails.

    costs: of the parts, the dearest first; the part i is the shard `shard + shards * i` of `shards * len(costs)`. What
    ends this process (SIGTERM, Ctrl-C) is passed on to them, and waited for: they save what they have.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    waiting, running, code = list(range(len(costs))), {}, 0
    costs = [max(cost, 1e-9) for cost in costs]
    began, done = time.monotonic(), 0.0
    try:
        while (waiting and not code) or running:
            free = [place for place in range(workers) if place not in running] if not code else []
            for place, part in zip(free, waiting[:len(free)]):
                waiting.remove(part)
                flag = f"--shard={shard + shards * part}/{shards * len(costs)}"
                with cores(place, workers):  # which a process begun here inherits
                    running[place] = part, subprocess.Popen([sys.executable, "-m", module, *sys.argv[1:], "--workers=1",
                                                             "--part", flag])
            time.sleep(0.1)
            for place, (part, process) in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    code, done = code or process.returncode, done + costs[part]
                    left = (time.monotonic() - began) * (sum(costs) / done - 1) / 60
                    ended = len(costs) - len(waiting) - len(running)
                    print(f"{ended} of {len(costs)} parts are done, about {left:.0f} min left", file=sys.stderr,
                          flush=True)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    if code:
        common.leave("a worker failed; what it said stands above, and the same command goes on", code)


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
