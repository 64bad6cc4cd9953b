"""Ctrl-C, SIGTERM and a closed terminal ask the run to end after the step at hand; a Ctrl-C after that, at once.

Python runs its signal handlers between bytecodes, so not while MLX evaluates a graph, which may take a minute. A thread
that reads the wake-up descriptor sees the signal at once: it answers, and ends the program if need be.

A hang-up that was ignored when the program began stays ignored: `nohup` means it. SIGTERM may come twice, from the
system and from the process that supervises, and means the same: only a Ctrl-C is impatient.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Self

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
PATIENCE = 0.5  # seconds that a second signal waits for Python's own way out
SHOW_CURSOR = "\x1b[?25h"  # a live bar hides it
PARENT = "ANARCHOBOT_PARENT"  # in the environment of a supervised run: the process that watches over it


def can_handle(number: int) -> bool:
    """Whether this signal may stop a run. (A shell ignores Ctrl-C, too, for what it starts in the background; there it
    can only be meant for the run itself.)"""
    return number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) is not signal.SIG_IGN


class StopRequest:
    """A context in which `requested` turns true at the first signal. Only the main thread may enter it."""

    def __init__(self, *, quiet: bool = False) -> None:
        """`quiet`: another process says what a signal does."""
        self._quiet = quiet
        self._signals = 0
        self._before: dict[int, Any] = {}
        self._ended = threading.Event()
        self._parent = int(os.environ.get(PARENT, 0))

    @property
    def requested(self) -> bool:
        """Also when the process that supervises this one is gone: nobody would hear of the run's end."""
        return self._signals > 0 or (self._parent > 0 and os.getppid() != self._parent)

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        for number in _SIGNALS:
            if can_handle(number):
                self._before[number] = signal.signal(number, self._receive)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
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
        seen = 0
        while number := os.read(self._reader, 1)[0]:
            if number not in self._before:
                continue
            seen += 1
            if seen == 1:
                self._say(f"\n{signal.Signals(number).name}: saving after this step; Ctrl-C to stop at once")
            elif number == signal.SIGINT and not self._ended.wait(PATIENCE):
                # Written checkpoints are whole at any moment, so there is nothing to wait for.
                self._say(f"stopped{SHOW_CURSOR if sys.stderr.isatty() else ''}")
                os._exit(130)

    def _say(self, text: str) -> None:
        if not self._quiet:
            with suppress(OSError):  # the terminal may have gone
                print(text, file=sys.stderr, flush=True)
