"""What a run wrote of itself, read back: settings, curves, events, and whether it is still going."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anarchobot.config.errors import UserError
from anarchobot.config.strict_yaml import parse
from anarchobot.storage.lock import holder

Point = tuple[int, float]
State = Literal["running", "finished", "stopped", "died"]
DEPTH = 3  # folders below the one that is searched


@dataclass(frozen=True)
class RunLog:
    """`events` are the lines of metrics.jsonl in their order, without those of steps that the run went back behind;
    `torn` counts lines that a kill cut off. `state`: "died" is a run that neither goes on nor said that it ended."""

    folder: Path
    config: dict[str, dict[str, Any]]
    events: list[dict[str, Any]]
    environment: dict[str, Any]
    torn: int
    state: State

    @property
    def name(self) -> str:
        return self.folder.name

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.events if line["event"] == event]

    def points(self, event: str, key: str) -> list[Point]:
        """(step, value) of a curve, by step."""
        found = {line["step"]: line[key] for line in self.of(event) if isinstance(line.get(key), int | float)}
        return sorted(found.items())

    def last(self, event: str, key: str) -> float | None:
        points = self.points(event, key)
        return points[-1][1] if points else None

    def best(self, key: str) -> Point | None:
        """The step and value of the least of a validation's figures."""
        return min(self.points("eval", key), key=lambda point: point[1], default=None)

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.events), default=0)


def read_run(path: str | Path) -> RunLog:
    """Raises UserError when there is no run's log."""
    folder = Path(path)
    config = _config(folder)
    logs = _logs(folder, config)
    try:
        text = (logs / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{folder}: no run here (no {logs / 'metrics.jsonl'}): expected a run's folder") from error
    events: list[dict[str, Any]] = []
    torn, ended = 0, None
    for text_line in text.splitlines():
        try:
            line = json.loads(text_line)
            step, kind = int(line["step"]), line["event"]
        except (ValueError, KeyError, TypeError):
            torn += bool(text_line.strip())
            continue
        if kind == "resume":  # what came behind that step is made anew
            events = [earlier for earlier in events if earlier["step"] <= step or earlier["event"] == "resume"]
        ended = line.get("finished") if kind == "end" else None
        events.append(line)
    return RunLog(folder, config, events, _environment(logs), torn, _state(folder, ended))


def find_runs(path: str | Path) -> Iterator[RunLog]:
    """Every run in a folder and below, by name. Raises UserError when the folder is none."""
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder: expected one with runs in it, such as runs/")
    here = [Path(path)]
    for _ in range(DEPTH + 1):
        for folder in sorted(here):
            if (folder / "config.yaml").is_file():
                try:
                    yield read_run(folder)
                except UserError:
                    continue  # a configuration alone
        here = [child for folder in here for child in folder.iterdir() if child.is_dir() and not child.is_symlink()]


def metrics_path(folder: Path) -> Path:
    """Where the run in `folder` writes its lines."""
    return _logs(folder, _config(folder)) / "metrics.jsonl"


def _logs(folder: Path, config: dict[str, dict[str, Any]]) -> Path:
    return Path(config.get("train", {}).get("log_path") or folder / "logs")


def _config(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / "config.yaml"
    try:
        found = parse(file.read_bytes(), str(file)).values
    except (OSError, UserError):
        return {}
    return {section: keys for section, keys in found.items() if isinstance(keys, dict)}


def _environment(logs: Path) -> dict[str, Any]:
    try:
        found = json.loads((logs / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _state(folder: Path, ended: bool | None) -> State:
    """A run holds its folder's lock as long as it lives."""
    if holder(folder) is not None:
        return "running"
    return "died" if ended is None else "finished" if ended else "stopped"
