"""The progress line: percent, step, loss, bits per byte, tokens per second, MFU and the time that is left."""

import sys
import time

INTERVAL = 5.0  # seconds between lines where the output is no terminal


class Progress:
    """Shows the rows of a run: one line that changes on a terminal, a line every few seconds elsewhere."""

    def __init__(self, name: str, steps: int, start: int = 0, quiet: bool = False, unit: str = "bits/byte"):
        self.name, self.steps, self.quiet, self.unit = name, steps, quiet, unit
        self.first, self.began, self.shown = start, time.monotonic(), 0.0
        self.live = None
        if sys.stderr.isatty() and not quiet:
            from rich.console import Console
            from rich.live import Live

            self.live = Live("", console=Console(stderr=True), refresh_per_second=8)
            self.live.start()

    def show(self, row: dict) -> None:
        """Shows a row of metrics; see `line`."""
        if self.quiet:
            return
        now = time.monotonic()
        done = row["step"] - self.first
        left = (now - self.began) / max(done, 1) * (self.steps - row["step"])
        text = line(self.name, self.steps, row, left, self.unit)
        if self.live:
            self.live.update(text)
        elif now - self.shown >= INTERVAL or row["step"] == self.steps or "validation_loss" in row:
            self.say(text)
            self.shown = now

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self.live.console.print(text) if self.live else print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live:
            self.live.stop()


def line(name: str, steps: int, row: dict, seconds_left: float, unit: str = "bits/byte") -> str:
    """One row in words: " 40%  step 80/200  loss 2.311  3.334 bits/byte  9,120 tok/s  MFU 31%  12s left"."""
    parts = [name, f"{row['step'] / steps:4.0%}", f"step {row['step']}/{steps}", f"loss {row['loss']:.3f}",
             f"{row['bits_per_byte']:.3f} {unit}"]
    if "validation_bits_per_byte" in row:
        parts.append(f"validation {row['validation_bits_per_byte']:.3f}")
    parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.0%}")
    minutes, seconds = divmod(round(seconds_left), 60)
    parts.append(f"{minutes // 60}h{minutes % 60:02d}m left" if minutes >= 60 else
                 f"{minutes}m{seconds:02d}s left" if minutes else f"{seconds}s left")
    return "  ".join(parts)
