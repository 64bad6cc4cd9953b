"""Timing of the parts of a training step."""

import statistics
import threading
import time
from collections import defaultdict

import mlx.core as mx


class Profile:
    """Notified of the parts of a training step. This one does nothing: it is what training uses."""

    def start(self) -> None:
        """The first part begins."""

    def end(self, part: str, *results: mx.array) -> None:
        """A part has built its `results`, and the next one begins."""


NO_PROFILE = Profile()


class TimedProfile(Profile):
    """Evaluates the results of each part and times it, in each of the engine's threads by itself."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._began: dict[int, float] = {}
        self._step: dict[str, float] = defaultdict(float)
        self._steps: list[dict[str, float]] = []
        self._lock = threading.Lock()

    def start(self) -> None:
        self._began[threading.get_ident()] = time.perf_counter()

    def end(self, part: str, *results: mx.array) -> None:
        mx.eval(*results)
        thread, now = threading.get_ident(), time.perf_counter()
        with self._lock:
            self._step[part] += (now - self._began[thread]) / self._threads
        self._began[thread] = now

    def finish_step(self) -> None:
        self._steps.append(dict(self._step))
        self._step.clear()

    def medians(self) -> dict[str, float]:
        """Seconds of each part in a step, the mean over the threads: the median over the steps but the first."""
        steps = self._steps[1:]
        return {part: statistics.median(step[part] for step in steps) for part in steps[0]}
