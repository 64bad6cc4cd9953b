"""Times the parts of a training step."""

import statistics
import threading
import time
from collections import defaultdict

import mlx.core as mx


class Profile:
    """Hooks for the parts of a training step. This no-op profiler is used in training."""

    def start(self) -> None:
        """Called when the first part begins."""

    def end(self, part: str, *results: mx.array) -> None:
        """Called when a part has built its `results` and the next part begins."""


NO_PROFILE = Profile()


class TimedProfile(Profile):
    """Evaluates the results of each part and measures its time, separately in each of the engine's threads."""

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
        """Returns the seconds per step of each part: the mean over threads, the median over all steps but the first."""
        steps = self._steps[1:]
        return {part: statistics.median(step[part] for step in steps) for part in steps[0]}
