"""Signals: Ctrl-C, SIGTERM and SIGHUP stop a run after the current step; a second Ctrl-C stops it immediately.

Python runs its signal handlers between bytecodes, so not while MLX evaluates a graph, which may take a minute. A thread
that reads the wake-up descriptor responds immediately and, on a second Ctrl-C, ends the process.

A SIGHUP that was ignored when the program started (`nohup`) stays ignored. SIGTERM may arrive twice, from the system
and from a supervising parent, and means the same both times: only a second Ctrl-C stops immediately.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
GRACE_SECONDS = 0.5  # after a second Ctrl-C, for KeyboardInterrupt to end the process
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it
PARENT_ENV = "ANARCHOBOT_PARENT"  # environment variable: process id of the parent that supervises this run


def can_handle(number: int) -> bool:
    """Returns False for a SIGHUP that was ignored at startup. (Shells ignore Ctrl-C for background jobs, but there a
    SIGINT can only be meant for the run itself.)"""
    return number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) is not signal.SIG_IGN


class StopRequest:
    """A context manager whose `requested` becomes true at the first signal. For the main thread only."""

    def __init__(self, *, quiet: bool = False) -> None:
        """`quiet`: print nothing; another process does."""
        self._quiet = quiet
        self._signals = 0
        self._previous: dict[int, Any] = {}
        self._ended = threading.Event()
        self._parent = int(os.environ.get(PARENT_ENV, 0))

    @property
    def requested(self) -> bool:
        """Also true if the supervising parent has exited."""
        return self._signals > 0 or (self._parent > 0 and os.getppid() != self._parent)

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        for number in SIGNALS:
            if can_handle(number):
                self._previous[number] = signal.signal(number, self._receive)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._writer, b"\0")
        self._watcher.join()
        os.close(self._reader)
        os.close(self._writer)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        count = 0
        while number := os.read(self._reader, 1)[0]:
            if number not in self._previous:
                continue
            count += 1
            if count == 1:
                name, key = (
                    ("Ctrl-C", "it again") if number == signal.SIGINT else (signal.Signals(number).name, "Ctrl-C")
                )
                self._print(f"\n{name}: saving after this step; press {key} to stop immediately")
            elif number == signal.SIGINT and not self._ended.wait(GRACE_SECONDS):
                # Checkpoints on disk are complete at any moment, so there is nothing to wait for.
                self._print("stopped")
                with suppress(OSError):
                    if os.isatty(2):
                        os.write(2, SHOW_CURSOR)
                os._exit(130)

    def _print(self, text: str) -> None:
        if not self._quiet:
            with suppress(OSError):  # the terminal may be closed
                print(text, file=sys.stderr, flush=True)


@contextmanager
def forward_signals(children: Sequence["subprocess.Popen[bytes]"]) -> Iterator[list[int]]:
    """A context manager that forwards signals to child processes; yields the list of forwarded signals."""
    forwarded: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        forwarded.append(number)
        for child in children:
            child.send_signal(number)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, forward) for number in SIGNALS if can_handle(number)}
    try:
        yield forwarded
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def print_status(text: str) -> None:
    """Prints one line on stderr in a single write, since several processes may print at once."""
    with suppress(OSError):  # the terminal may be closed
        print(f"anarchobot: {text}\n", end="", file=sys.stderr, flush=True)
