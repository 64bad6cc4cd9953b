"""Checkpoints beside the training: one thread writes what the training thread hands it, and a failed write is said and
tried again, never the end of a run."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from anarchobot.config.errors import UserError
from anarchobot.config.schema import TrainConfig
from anarchobot.runs import checkpoint
from anarchobot.runs.checkpoint import Arrays
from anarchobot.storage.durable import write_sealed

RETRY_SECONDS = 60.0  # after a failed write, during a run
LAST_TRIES, LAST_PAUSE = 10, 15.0  # at its end, when there is nothing else to do: tries, and seconds between them


@dataclass(frozen=True)
class SaveResult:
    """A save that has ended. `written`: it is on the disk; `error`: what went wrong, and with `what`, which may be the
    removal of older steps alone; `seconds`: how long it took."""

    step: int
    written: bool
    removed: list[int]
    seconds: float
    error: Exception | None = None
    what: str = "saving"


class AsyncCheckpointer:
    """A context; at its end all that was handed over has been written, or has failed.

    `newest` is the newest step of this run that is on the disk. `on_saved` is called, in the caller's thread, for each
    save that has ended.
    """

    def __init__(self, run: Path, train: TrainConfig, newest: int, on_saved: Callable[[SaveResult], None]) -> None:
        self.newest = newest
        self._run, self._train, self._on_saved = run, train, on_saved
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: deque[Future[SaveResult]] = deque()
        self._handed_over = newest
        self._last_time = time.monotonic()
        self._retry_at: float | None = None
        self._best: dict[str, Any] | None = None  # a name that could not be written yet
        self._name_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def has(self, step: int) -> bool:
        """Whether this step has been handed over; it may have failed since."""
        return self._handed_over == step

    def due(self, step: int) -> bool:
        minutes = self._train.ckpt_minutes
        now = time.monotonic()
        return (
            step % self._train.ckpt_interval == 0
            or (minutes is not None and now - self._last_time >= 60 * minutes)
            or (self._retry_at is not None and now >= self._retry_at)
        )

    def save(self, step: int, arrays: Arrays, state: dict[str, Any]) -> None:
        """Hands a step over; `arrays` must not change any more. Waits for the one before it: memory holds one."""
        self.wait()
        self._handed_over, self._last_time, self._retry_at = step, time.monotonic(), None
        self._under_way.append(self._pool.submit(self._write, step, arrays, state))

    def name_best(self, step: int, values: dict[str, Any]) -> bool:
        """Names a step that was handed over the best, once it is on the disk; False when it is not there. If the name
        can't be written, that is tried again later, and the step is not removed meanwhile."""
        self.wait()
        if self.newest != step:
            return False
        self._best = {"step": step, "folder": checkpoint.folder_of(self._run, step).name, **values}
        self._write_name()
        return True

    def finish_naming(self) -> None:
        """At the end of a run: the last chance of a name that could not be written."""
        if self._best is not None:
            self._write_name()

    def _write_name(self) -> None:
        best = self._best
        assert best is not None
        try:
            write_sealed(self._run / "best.json", best)
            self._best = None
        except OSError as error:
            self._name_at = time.monotonic() + RETRY_SECONDS
            self._on_saved(SaveResult(best["step"], False, [], 0.0, error, "naming the best step"))

    def poll(self) -> None:
        """Takes note of saves that have ended."""
        if self._best is not None and time.monotonic() >= self._name_at:
            self._write_name()
        while self._under_way and self._under_way[0].done():
            saved = self._under_way.popleft().result()
            if saved.written:
                self.newest = saved.step
            else:
                self._handed_over, self._retry_at = self.newest, time.monotonic() + RETRY_SECONDS
            self._on_saved(saved)

    def wait(self) -> None:
        """Until all that was handed over is on the disk or has failed."""
        for future in self._under_way:
            future.exception()
        self.poll()

    def finish(self, step: int, arrays: Callable[[], Arrays], state: dict[str, Any]) -> None:
        """Sees to it that the run's last step is on the disk. Raises UserError when it can't be brought there."""
        self.wait()
        for attempt in range(LAST_TRIES):
            if self.newest == step:
                return
            if attempt:
                time.sleep(LAST_PAUSE)
            self.save(step, arrays(), state)
            self.wait()
        raise UserError(
            f"{self._run}: step {step} could not be saved in {LAST_TRIES} tries; the newest saved one is "
            f"{self.newest}: make room, then go on from there (--resume-from auto)"
        )

    def _write(self, step: int, arrays: Arrays, state: dict[str, Any]) -> SaveResult:
        began = time.monotonic()
        written, removed, problem, what = False, [], None, "saving"
        try:
            checkpoint.save(self._run, step, arrays, state)
            written, what = True, "tidying up behind the checkpoint"
            best = self._best
            # Only now, when the new one has been read back, may an older one go.
            removed = checkpoint.rotate(self._run, self._train.ckpt_keep, None if best is None else best["step"])
        except Exception as error:  # whatever it is, it must not end the run
            problem = error
        return SaveResult(step, written, removed, time.monotonic() - began, problem, what)


class NullCheckpointer(AsyncCheckpointer):
    """Of a rank beside the first, which saves for all."""

    def has(self, step: int) -> bool:
        return True

    def due(self, step: int) -> bool:
        return False

    def save(self, step: int, arrays: Arrays, state: dict[str, Any]) -> None: ...

    def name_best(self, step: int, values: dict[str, Any]) -> bool:
        return True

    def finish(self, step: int, arrays: Callable[[], Arrays], state: dict[str, Any]) -> None: ...
