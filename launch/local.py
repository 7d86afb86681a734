"""Runs a command as several processes on this machine, joined by `jax.distributed`.

    python -m launch.local --processes=2 -- python -m experiments.train --model=transformer-tiny --batch=8

Each process gets `--distributed --coordinator=localhost:PORT --processes=N --process_id=I` after its own arguments.
It is how a run for many machines is tried on one: same code, same flags, only slower. Lines are prefixed with the
process that wrote them. If one process fails, the others are ended, since they would wait for it without end; SIGTERM
and Ctrl-C go to all of them. The exit code is the worst of those that ended by themselves.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

PATIENCE = 5  # seconds from one failure until the others are told to end, and from then until they are killed
SAVING = 120  # the same where they have been told to save and stop


def launch(command: list[str], processes: int, devices_per_process: int | None = None) -> int:
    """Runs `command` in so many processes until all have ended; returns the worst exit code (128 + n for signal n).

    Args: devices_per_process: CPU devices that each pretends to have; None leaves that to JAX.
    """
    if not command or processes < 1 or (devices_per_process is not None and devices_per_process < 1):
        raise ValueError(f"needs a command, 1 or more processes and devices: {command}, {processes}, "
                         f"{devices_per_process}")
    environment = dict(os.environ)
    if devices_per_process is not None:
        flag = f"--xla_force_host_platform_device_count={devices_per_process}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} {flag}".strip()}
    shared = ["--distributed", f"--coordinator=localhost:{_free_port()}", f"--processes={processes}"]
    group: list[subprocess.Popen] = []
    told = []  # signals passed on

    def tell(number, frame=None):
        told.append(number)
        _signal_all(group, number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for i in range(processes):
            group.append(subprocess.Popen([*command, *shared, f"--process_id={i}"], env=environment, text=True,
                                          errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                          start_new_session=True))  # of its own, so that a signal comes once
        printers = [threading.Thread(target=_print_lines, args=(i, process)) for i, process in enumerate(group)]
        for printer in printers:
            printer.start()
        codes = _wait(group, told)
        for printer in printers:
            printer.join()
        return max(codes)
    finally:
        _signal_all(group, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(group: list[subprocess.Popen], told: list) -> list[int]:
    """Waits for all; ends what is left some time after the first failure. Returns the codes of those not so ended."""
    codes, failed = {}, None
    while len(codes) < len(group):
        for i, process in enumerate(group):
            if i not in codes and process.poll() is not None:
                codes[i] = process.returncode if process.returncode >= 0 else 128 - process.returncode
                if codes[i] and failed is None:
                    failed = time.monotonic()
                    print(f"[{i}] ended with exit code {codes[i]}", flush=True)
        late = 0 if failed is None else time.monotonic() - failed - (SAVING if told else PATIENCE)
        if late > 0:
            rest = [process for i, process in enumerate(group) if i not in codes]
            _signal_all(rest, signal.SIGTERM)
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end and any(process.poll() is None for process in rest):
                time.sleep(0.05)
            _signal_all(rest, signal.SIGKILL)
            break
        time.sleep(0.05)
    return list(codes.values())


def _signal_all(group: list[subprocess.Popen], number: int) -> None:
    for process in group:
        if process.poll() is None:
            os.killpg(process.pid, number)


def _print_lines(i: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        sys.stdout.write(f"[{i}] {line.rstrip()}\n")
        sys.stdout.flush()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.local", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument("--devices_per_process", type=int, help="CPU devices that each pretends to have")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command with its arguments")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    try:
        code = launch(command, arguments.processes, arguments.devices_per_process)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.exit(code)


if __name__ == "__main__":
    main()
