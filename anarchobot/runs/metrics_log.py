"""A run's metrics: metrics.jsonl, TensorBoard event files, trackers and, at the end, a JSON summary.

Every event is flushed as it is written, so that a killed run loses at most its last line. A failed write (a full disk)
is counted and never ends the run.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TextIO

from anarchobot.runs.event_file import EventFile, append
from anarchobot.runs.trackers import End, TrackerThread
from anarchobot.storage.durable import parse_json, write_atomic

METRICS, SUMMARY, ENVIRONMENT = "metrics.jsonl", "final_training_summary.json", "environment.json"
LAST_TIME = 253_370_764_800  # seconds since 1970: the year 9999
SCALAR_EVENTS = ("train", "eval")  # all their values are numbers and go to TensorBoard and trackers as well

Event = dict[str, Any]


def parse_events(data: bytes) -> tuple[list[Event], int]:
    """Parses lines of metrics.jsonl. Also returns the number of malformed lines, such as one truncated by a kill.

    In each event, `step` is an integer, `event` a string, and `time`, if it has one, a date up to the year 9999.
    """
    events, malformed = [], 0
    for line in data.splitlines():
        try:
            event = parse_json(line)
            if not _is_event(event):
                raise ValueError("not an event")
        except ValueError:
            malformed += bool(line.strip())
        else:
            events.append(event)
    return events, malformed


def _is_event(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(step := value.get("step")) is int
        and 0 <= step < 2**63
        and isinstance(value.get("event"), str)
        and isinstance(when := value.get("time", 0), int | float)
        and 0 <= when < LAST_TIME
    )


class MetricsLog:
    """Appends events to `folder`/metrics.jsonl, `folder`/tensorboard, `echo` and `trackers`. A context manager. `lost`
    is the number of events that could not be written. `warn` is called if a tracker fails."""

    def __init__(
        self,
        folder: Path,
        echo: TextIO | None = None,
        *,
        tensorboard: bool = True,
        trackers: Sequence[TrackerThread] = (),
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.lost, self._echo = folder, 0, echo
        self._trackers, self._warn = trackers, warn
        self._end: End = "failed"
        path = folder / METRICS
        truncated = path.exists() and not path.read_bytes().endswith(b"\n")  # the previous run was killed while writing
        self._file = path.open("ab", buffering=0)
        if truncated:
            self._file.write(b"\n")
        self._tensorboard = EventFile(folder / "tensorboard") if tensorboard else None

    def event(self, event: str, step: int, **values: Any) -> None:
        """Writes one JSON object: step, event, time (seconds since 1970) and the values. A number that is not finite
        becomes a string, such as "nan"."""
        line = _to_json({"step": step, "event": event, "time": round(time.time(), 3), **values}) + "\n"
        scalars = {f"{event}/{name}": x for name, x in values.items()} if event in SCALAR_EVENTS else {}
        try:
            append(self._file, line.encode())
            if self._tensorboard is not None and scalars:
                self._tensorboard.add_scalars(step, scalars)
            if self._tensorboard is not None and event == "sample":
                self._tensorboard.add_text(step, "sample", values["text"])
        except OSError:
            self.lost += 1
        if self._echo is not None:
            with suppress(OSError):  # the reader has closed the pipe
                self._echo.write(line)
                self._echo.flush()
        if event == "end":
            self._end = "finished" if values["finished"] else "stopped"
        for tracker in self._trackers:
            if scalars:
                tracker.log(step, scalars)
            if event == "sample":
                tracker.log_text(step, "sample", values["text"])
            if text := tracker.first_error():
                self._warn(text)
                self.event("warning", step, text=text)

    def config(self, step: int, text: str) -> None:
        """Shows the configuration in TensorBoard, as Markdown."""
        with suppress(OSError):
            if self._tensorboard is not None:
                self._tensorboard.add_text(step, "config", f"```yaml\n{text}```")

    def steps_of(self, event: str) -> set[int]:
        """Returns the steps at which this kind of event was logged, including before a resume."""
        events, _ = parse_events((self.folder / METRICS).read_bytes())
        return {line["step"] for line in events if line["event"] == event}

    def summary(self, values: dict[str, Any]) -> None:
        try:
            write_atomic(self.folder / SUMMARY, _to_json(values, indent=1) + "\n")
        except OSError:
            self.lost += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for tracker in self._trackers:
            if text := tracker.close(self._end):
                self._warn(text)
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _to_json(values: dict[str, Any], indent: int | None = None) -> str:
    return json.dumps(_strict(values), indent=indent, allow_nan=False)


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _strict(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(x) for x in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
