"""What a run has logged so far, followed while it goes on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anarchobot.reporting.monitor import LogTail
from anarchobot.runs.metrics_log import ENVIRONMENT, Event
from anarchobot.runs.run_log import Point, finite, metrics_path, read_json, read_run

RECENT = 20  # log lines that the remaining time is estimated from


class RunStatus:
    """What a run has logged, updated as it goes on. `steps` is its length, or None if the log does not have it."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if there is no run."""
        self._tail = LogTail(folder)  # first, so that no event is between the two
        run = read_run(folder)
        self._environment = metrics_path(folder).with_name(ENVIRONMENT)
        self.steps = _number_of_steps(run.environment)
        self.step, self.warning = 0, ""
        self.train: dict[str, float] = {}  # the numbers of the newest line
        self.losses: dict[int, float] = {}  # smoothed, by step
        self.evals: dict[int, dict[str, float]] = {}
        self._recent: list[tuple[int, float]] = []  # steps and times since the last start
        self._add(run.events)

    def update(self) -> None:
        self._add(self._tail.read())
        self.steps = _number_of_steps(read_json(self._environment)) or self.steps  # `train` changes it

    def _add(self, events: Iterable[Event]) -> None:
        for event in events:
            name, step = event["event"], event["step"]
            if name == "resume":  # later steps are trained again
                self.losses = {at: loss for at, loss in self.losses.items() if at <= step}
                self.evals = {at: values for at, values in self.evals.items() if at <= step}
                self._recent = []
            elif name == "train":
                self.train = _numbers(event)
                if "smooth_loss" in self.train:
                    self.losses[step] = self.train["smooth_loss"]
                self._recent = [*self._recent, (step, self.train.get("time", 0.0))][-RECENT:]
            elif name == "eval" and "val_loss" in _numbers(event):
                self.evals[step] = _numbers(event)
            elif name == "warning" or (name == "skip" and event.get("reason") != "spike"):
                self.warning = f"step {step}: {event.get('text') or event.get('reason')}"
            self.step = step

    @property
    def seconds_left(self) -> float | None:
        """From the steps of the last log lines, with validation and saving. None if unknown."""
        if self.steps is None or len(self._recent) < 2:
            return None
        (first, began), (last, ended) = self._recent[0], self._recent[-1]
        return max(0, self.steps - last) * (ended - began) / (last - first) if last > first else None

    @property
    def best(self) -> Point | None:
        losses = [(step, event["val_loss"]) for step, event in self.evals.items()]
        return min(losses, key=lambda point: point[1], default=None)


def _number_of_steps(environment: dict[str, Any]) -> int | None:
    steps = environment.get("steps")
    return steps if isinstance(steps, int) else None


def _numbers(event: Event) -> dict[str, float]:
    return {key: number for key, value in event.items() if (number := finite(value)) is not None}
