"""Reads what a run wrote: its configuration, events, environment and summary, and whether it is still running."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anarchobot.config.errors import UserError
from anarchobot.config.paths import did_you_mean_run
from anarchobot.config.strict_yaml import parse
from anarchobot.runs.metrics_log import ENVIRONMENT, METRICS, SUMMARY, Event, parse_events
from anarchobot.storage.durable import parse_json
from anarchobot.storage.lock import holder

Point = tuple[int, float]
State = Literal["running", "finished", "stopped", "died"]
SEARCH_DEPTH = 3  # levels of subfolders that find_runs descends


@dataclass(frozen=True)
class RunLog:
    """`events` are the lines of metrics.jsonl in order, without steps that a resume made obsolete. `malformed` counts
    truncated lines. `state` is "died" if the run is neither running nor logged its end."""

    folder: Path
    config: dict[str, dict[str, Any]]
    events: list[Event]
    environment: dict[str, Any]
    malformed: int
    state: State

    @property
    def name(self) -> str:
        return self.folder.name

    def events_of(self, event: str) -> list[Event]:
        return [line for line in self.events if line["event"] == event]

    def points(self, event: str, key: str) -> list[Point]:
        """Returns a curve as (step, value) pairs in order of steps, without values that are not finite."""
        values = {line["step"]: finite(line.get(key)) for line in self.events_of(event)}
        return sorted((step, x) for step, x in values.items() if x is not None)

    def last(self, event: str, key: str) -> float | None:
        points = self.points(event, key)
        return points[-1][1] if points else None

    def best(self, key: str) -> Point | None:
        """Returns the step and value of the lowest validation result."""
        return min(self.points("eval", key), key=lambda point: point[1], default=None)

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.events), default=0)


def read_run(path: str | Path) -> RunLog:
    """Raises UserError if there is no metrics.jsonl."""
    folder = Path(path)
    config = _read_config(folder)
    logs = logs_dir(folder, _log_path(config))
    try:
        data = (logs / METRICS).read_bytes()
    except OSError as error:
        near = did_you_mean_run(folder) or f" (no {logs / METRICS}): expected a run folder"
        if (folder / "config.yaml").is_file():
            near = f" yet: anarchobot monitor {folder} --wait shows it from its start"
        raise UserError(f"{folder}: no run here{near}") from error
    lines, malformed = parse_events(data)
    events: list[Event] = []
    ended = None
    for line in lines:
        if line["event"] == "resume":  # later steps are trained again
            events = [earlier for earlier in events if earlier["step"] <= line["step"] or earlier["event"] == "resume"]
        ended = line.get("finished") if line["event"] == "end" else None
        events.append(line)
    # A run holds its folder's lock for as long as it lives.
    state: State = "died" if ended is None else "finished" if ended else "stopped"
    if holder(folder) is not None:
        state = "running"
    return RunLog(folder, config, events, read_json(logs / ENVIRONMENT), malformed, state)


def find_runs(path: str | Path) -> Iterator[RunLog]:
    """Finds all runs in a folder and its subfolders, sorted by name within a level. Raises UserError if there is no
    such folder."""
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder: expected one that contains runs, such as runs/")
    level = [Path(path)]
    for _ in range(SEARCH_DEPTH + 1):
        for folder in sorted(level):
            if (folder / "config.yaml").is_file():
                try:
                    yield read_run(folder)
                except UserError:
                    continue  # a configuration without a run
        level = [child for folder in level for child in folder.iterdir() if child.is_dir() and not child.is_symlink()]


def logs_dir(run: Path, log_path: str | None) -> Path:
    """Returns the folder of a run's logs; `log_path` is its train.log_path."""
    return Path(log_path or run / "logs")


def finite(value: Any) -> float | None:
    try:
        return value if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an integer beyond any float
        return None


def metrics_path(run: Path) -> Path:
    return logs_dir(run, _log_path(_read_config(run))) / METRICS


def _log_path(config: dict[str, dict[str, Any]]) -> str | None:
    path = config.get("train", {}).get("log_path")
    return path if isinstance(path, str) and "\0" not in path else None


def read_events(logs: Path) -> list[Event]:
    """Returns all events in a logs folder, obsolete events included; empty if there is no log."""
    file = logs / METRICS
    return parse_events(file.read_bytes())[0] if file.is_file() else []


def read_summary(logs: Path) -> dict[str, Any]:
    """Returns the run's summary; empty while it is running or if it was killed."""
    return read_json(logs / SUMMARY)


def _read_config(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / "config.yaml"
    try:
        values = parse(file.read_bytes(), str(file)).values
    except (OSError, UserError):
        return {}
    return {section: keys for section, keys in values.items() if isinstance(keys, dict)}


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
