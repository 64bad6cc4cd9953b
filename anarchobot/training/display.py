"""Shows a run: a progress bar on a terminal, plain lines in a pipe or log file."""

import sys
import time
from contextlib import suppress
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class _Console(Console):
    """rich exits the program when a pipe is closed; here that must not end the run."""

    def on_broken_pipe(self) -> None:
        raise OSError("output is closed")


class TerminalDisplay:
    """Prints to stderr; stdout is for results. Stops printing if the terminal is closed: the log has everything."""

    def __init__(self, steps: int, start: int, quiet: bool = False) -> None:
        self._steps, self._start, self._quiet = steps, start, quiet
        self._began = time.monotonic()
        self._console = _Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=start)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(OSError):
            self._bar.stop()

    def train(self, step: int, values: dict[str, Any]) -> None:
        per_step = (time.monotonic() - self._began) / max(1, step - self._start)
        text = (
            f"loss {values['loss']:.4f} (smooth {values['smooth_loss']:.4f}) | lr {values['lr']:.2e} | "
            f"norm {values['grad_norm']:.2f} | {values['tokens_per_second']:,.0f} tok/s{_tflops(values)} | "
            f"{duration(per_step * (self._steps - step))} left | {values['peak_memory_gb']:.2f} GB"
        )
        if not self._bar.disable:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.message(f"step {step}/{self._steps} | {text}")

    def message(self, text: str) -> None:
        if not self._quiet:
            try:
                self._console.print(text, markup=False)
            except OSError:
                self._quiet = True


def _tflops(values: dict[str, Any]) -> str:
    if "tflops" not in values:
        return ""
    share = f" ({values['peak_share']:.0%} of peak)" if "peak_share" in values else ""
    return f", {values['tflops']:.3g} TFLOP/s{share}"


def duration(seconds: float) -> str:
    """`0:05`, `12:30`, `3:04:05`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
