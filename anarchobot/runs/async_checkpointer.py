"""Saves checkpoints in a background thread. A failed save is reported and retried; it never ends the run."""

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
from anarchobot.storage.free_space import require_space

RETRY_SECONDS = 60.0  # after a failed save during the run
FINAL_ATTEMPTS, FINAL_PAUSE = 10, 15.0  # at the end of the run: attempts, and seconds between them


@dataclass(frozen=True)
class SaveResult:
    """`action` is what failed with `error`: a checkpoint may have been `written` and the removal of old ones failed."""

    step: int
    written: bool
    removed: list[int]
    seconds: float
    error: Exception | None = None
    action: str = "saving"


class AsyncCheckpointer:
    """A context manager; on exit, all submitted saves have completed or failed.

    `newest` is the newest step of this run on disk. `on_result` is called in the caller's thread for each completed
    save. If not `enabled` (ranks other than 0), nothing is saved.
    """

    def __init__(
        self,
        run: Path,
        train: TrainConfig,
        newest: int,
        on_result: Callable[[SaveResult], None],
        *,
        enabled: bool = True,
    ) -> None:
        self.newest, self._enabled = newest, enabled
        self._run, self._train, self._on_result = run, train, on_result
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: deque[Future[SaveResult]] = deque()
        self._submitted = newest
        self._last_time = time.monotonic()
        self._retry_at: float | None = None
        self._best: tuple[int, dict[str, Any]] | None = None  # a best.json that could not be written yet
        self._retry_best_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def is_submitted(self, step: int) -> bool:
        """Whether the last save is of this step; it may still be running."""
        return not self._enabled or self._submitted == step

    def is_due(self, step: int) -> bool:
        minutes = self._train.ckpt_minutes
        now = time.monotonic()
        return self._enabled and (
            step % self._train.ckpt_interval == 0
            or (minutes is not None and now - self._last_time >= 60 * minutes)
            or (self._retry_at is not None and now >= self._retry_at)
        )

    def save(self, step: int, arrays: Arrays, state: dict[str, Any]) -> None:
        """Submits a step; `arrays` must not change afterwards. Waits for the previous save, to limit memory."""
        if not self._enabled:
            return
        self.wait()
        self._submitted, self._last_time, self._retry_at = step, time.monotonic(), None
        self._pending.append(self._pool.submit(self._write, step, arrays, state))

    def mark_best(self, step: int, values: dict[str, Any]) -> bool:
        """Writes best.json once the submitted `step` is on disk; returns False if its save failed. If best.json can't
        be written, that is retried later, and the step is not removed until then."""
        if not self._enabled:
            return True
        self.wait()
        if self.newest != step:
            return False
        self._best = (step, values)
        self._write_best()
        return True

    def retry_best(self) -> None:
        """Retries a failed write of best.json at the end of the run."""
        if self._best is not None:
            self._write_best()

    def _write_best(self) -> None:
        assert self._best is not None
        step, values = self._best
        try:
            checkpoint.write_best(self._run, step, values)
            self._best = None
        except OSError as error:
            self._retry_best_at = time.monotonic() + RETRY_SECONDS
            self._on_result(SaveResult(step, False, [], 0.0, error, "writing best.json"))

    def poll(self) -> None:
        """Handles completed saves."""
        if self._best is not None and time.monotonic() >= self._retry_best_at:
            self._write_best()
        while self._pending and self._pending[0].done():
            result = self._pending.popleft().result()
            if result.written:
                self.newest = result.step
            else:
                self._submitted, self._retry_at = self.newest, time.monotonic() + RETRY_SECONDS
            self._on_result(result)

    def wait(self) -> None:
        """Waits until all submitted saves have completed or failed."""
        for future in self._pending:
            future.exception()
        self.poll()

    def finish(self, step: int, arrays: Callable[[], Arrays], state: dict[str, Any]) -> None:
        """Saves the run's last step unless it is on disk. Raises UserError after FINAL_ATTEMPTS failures."""
        if not self._enabled:
            return
        self.wait()
        for attempt in range(FINAL_ATTEMPTS):
            if self.newest == step:
                return
            if attempt:
                time.sleep(FINAL_PAUSE)
            self.save(step, arrays(), state)
            self.wait()
        raise UserError(
            f"{self._run}: step {step} could not be saved in {FINAL_ATTEMPTS} attempts; newest checkpoint: step "
            f"{self.newest}: free some disk space, then resume with --resume-from auto"
        )

    def _write(self, step: int, arrays: Arrays, state: dict[str, Any]) -> SaveResult:
        began = time.monotonic()
        written, removed, problem, action = False, [], None, "saving"
        try:
            require_space(self._run, sum(array.nbytes for array in arrays.values()))
            checkpoint.save(self._run, step, arrays, state)
            written, action = True, "removing old checkpoints"
            best = self._best
            # Old checkpoints are removed only now that the new one is verified.
            protected = [step] if best is None else [step, best[0]]
            removed = checkpoint.rotate(self._run, self._train.ckpt_keep, protected)
        except Exception as error:  # any error: a failed save must not end the run
            problem = error
        return SaveResult(step, written, removed, time.monotonic() - began, problem, action)
