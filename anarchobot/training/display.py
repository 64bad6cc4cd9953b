"""Shows a run: a progress bar on a terminal, plain lines in a pipe or log file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from anarchobot.config.terminal import visible

BAR_WIDTH = 20


class _Console(Console):
    """Also prints what others write to stdout and stderr while the bar is shown."""

    def print(self, *objects: Any, **kwargs: Any) -> None:
        """Escapes control characters in strings and texts: samples and names of files may have some."""
        texts = [visible(x.plain if isinstance(x, Text) else x) if isinstance(x, Text | str) else x for x in objects]
        super().print(*texts, **{"markup": False, **kwargs})

    def on_broken_pipe(self) -> None:
        """rich exits the program when a pipe is closed; here that must not end the run."""
        raise OSError("output is closed")


class TerminalDisplay:
    """Prints to stderr; stdout is for results. Stops printing if the terminal is closed: the log has everything."""

    def __init__(self, steps: int, start: int, quiet: bool = False) -> None:
        self._steps, self._start, self._quiet = steps, start, quiet
        self._began = time.monotonic()
        self._console = _Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar = Progress(  # drawn ten times a second
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=BAR_WIDTH),
            # Takes what is left of the line, and is cut if that is too little.
            TextColumn("{task.fields[now]}{task.description}", table_column=Column(ratio=1, no_wrap=True)),
            console=self._console,
            expand=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=start, now="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(OSError):
            self._bar.stop()

    def step(self, step: int, smooth_loss: float) -> None:
        """Advances the bar."""
        if not self._bar.disable:
            self._bar.update(self._task, completed=step, now=self._now(step, f"{smooth_loss:.4f}"))

    def train(self, step: int, values: dict[str, Any]) -> None:
        """Shows the values of a log line: beside the bar, which has no room for two losses, or as a line of its own."""
        parts = [
            f"lr {values['lr']:.2e}",
            f"norm {values['grad_norm']:.2f}",
            f"{values['tokens_per_second']:,.0f} tok/s{_tflops(values)}",
            f"{values['peak_memory_gb']:.2f} GB",
            *_reward(values),
        ]
        smooth = f"{values['smooth_loss']:.4f}"
        if self._bar.disable:
            now = self._now(step, f"{values['loss']:.4f} (smooth {smooth})")
            self.message(" | ".join([f"step {step}/{self._steps}", now, *parts]))
        else:
            now = self._now(step, smooth)
            self._bar.update(self._task, completed=step, now=now, description=self._fitting(now, parts))

    def _fitting(self, now: str, parts: list[str]) -> str:
        """As many of the parts as the line beside the bar has room for."""
        room = self._console.width - len(f"step {self._steps}/{self._steps}  {now} ") - BAR_WIDTH
        ends = accumulate(len(part) + 3 for part in parts)
        return "".join(f" | {part}" for part, end in zip(parts, ends, strict=True) if end <= room)

    def _now(self, step: int, loss: str) -> str:
        per_step = (time.monotonic() - self._began) / max(1, step - self._start)
        return f"loss {loss} | {duration(per_step * (self._steps - step))} left"

    def message(self, text: str) -> None:
        if not self._quiet:
            try:
                self._console.print(text)
            except OSError:
                self._quiet = True


@contextmanager
def count_bar(label: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Shows a bar and the remaining time on a terminal, while work is done that `total` counts. Yields a function that
    advances it."""
    console = _Console(file=sys.stderr, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def activity_bar(label: str, quiet: bool = False) -> Iterator[Callable[[float], None]]:
    """Shows a moving bar and the elapsed time on a terminal while work is done; then it vanishes. Yields a function
    that takes the fraction of the work that is done: from its first call on, the bar shows that and the remaining
    time."""
    console = _Console(file=sys.stderr, highlight=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn(),
        TaskProgressColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda fraction: bar.update(task, total=1, completed=min(1, fraction))


def _reward(values: dict[str, Any]) -> list[str]:
    return [f"reward {values['reward']:.3f}"] if "reward" in values else []


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
