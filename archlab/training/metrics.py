"""Where the numbers of a run go: a file of JSON lines, TensorBoard, and Weights & Biases where asked for."""

import functools
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp

# Matrix products per second in bfloat16, from the makers' data sheets (dense), by `device_kind`.
PEAK_FLOPS = {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
              "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12,
              "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


class Lines:
    """A file of JSON lines, objects with a `step`, written through at once.

    Opened again to go on after `step`, it drops the later rows (their steps are about to be run again) and a last line
    that was cut off; `rows` are those that stay. A file is made with the first row.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path, self.file = path, None
        self.rows = [row for row in read_rows(path) if row["step"] <= step]
        if path.is_file():
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            os.replace(part, path)

    def write(self, row: dict) -> None:
        self.rows.append(row)
        self.file = self.file or self.path.open("a")
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.file:
            self.file.close()


class Journal:
    """`metrics.jsonl` in a folder, one object per logged step; beside it, of models with experts, `experts.jsonl`
    (`ExpertRecord`). `rows`: those of the metrics."""

    def __init__(self, folder: Path | str, step: int = 0, tensorboard: bool = True, wandb: str | None = None,
                 config: str = "{}"):
        """Args: step: to go on after (`Lines`). wandb: the name of a project, or None. config: JSON to show there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics, self.experts = Lines(folder / "metrics.jsonl", step), Lines(folder / "experts.jsonl", step)
        self.board = self.wandb = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if wandb:
            try:
                import wandb as client
            except ImportError as error:
                raise ValueError("wandb is not installed: pip install 'archlab[wandb]'") from error
            self.wandb = client.init(project=wandb, dir=str(folder), config=json.loads(config), resume="allow")

    @property
    def rows(self) -> list[dict]:
        return self.metrics.rows

    def write(self, row: dict) -> None:
        self.metrics.write(row)
        numbers = {key: value for key, value in row.items() if key != "step"}
        for name, value in numbers.items() if self.board else ():
            self.board.add_scalar(name, value, row["step"])
        if self.wandb:
            self.wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        self.metrics.close()
        self.experts.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def read_rows(path: Path | str) -> list[dict]:
    """The rows of a `metrics.jsonl`, without a last line that was cut off; none where there is no file."""
    path, rows = Path(path), []
    if not path.is_file():
        return rows
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines) - 1:
                raise ValueError(f"{path}, line {number + 1} is no JSON: {error}") from error
    return rows


@functools.cache
def peak_flops(dtype: str) -> float:
    """Floating-point operations per second that all devices of the run reach together at best.

    From the data sheet where device and dtype ("bfloat16") are in it; else measured, by a matrix product of
    1024 x 1024 in that dtype, the best of ten. The fake devices of one CPU share it.
    """
    device = jax.local_devices()[0]
    devices = 1 if device.platform == "cpu" else jax.device_count()
    if dtype == "bfloat16" and device.device_kind in PEAK_FLOPS:
        return PEAK_FLOPS[device.device_kind] * devices
    size, seconds = 1024, []
    a = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32)))
    product(a).block_until_ready()
    for _ in range(10):
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) * devices
