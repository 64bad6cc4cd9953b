"""Cached, resumable pipeline stages. Each stage has a folder, and a record of what its results depend on.

    ROOT/NAME/                 results of the stage
    ROOT/records/NAME.begun    settings and digests of the inputs; written when the stage starts
    ROOT/records/NAME.json     the same, plus digests of the results, metrics and seconds; written when it is done

A stage is skipped while its record matches its settings, inputs and results. An interrupted stage is resumed.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import dotted_items
from anarchobot.storage.durable import read_checksummed, sha256_file, write_checksummed

RECORDS = "records"
FORMER_SETTINGS = {"deduplicate": "dedup"}  # settings in records of earlier versions, and their current names
MAX_CHANGES = 3  # changed settings that a message lists
Values = dict[str, Any]
Output = tuple[Sequence[Path], Values]  # result files, metrics
Work = Callable[[Path], Output]
Progress = Callable[[float], None]


def _ignore(fraction: float) -> None:
    """Shows no progress."""


class StageInterrupted(Exception):
    """The user stopped a stage, which can be resumed."""


@dataclass(frozen=True)
class StageResult:
    """The folder of a finished stage and its record. `notes` are its metrics."""

    folder: Path
    record: Values

    @property
    def notes(self) -> Values:
        return dict(self.record["notes"])

    @property
    def digest(self) -> str:
        """Identifies the contents of the result files."""
        return hashlib.sha256(json.dumps(self.record["outputs"], sort_keys=True).encode()).hexdigest()


@dataclass
class StageRunner:
    """Runs stages in `root`. A stage that fails with anything but a UserError is retried `retries` times, `backoff`
    seconds apart. `log` receives messages. A stage runs inside `busy(name)`, and may call `progress` with the fraction
    of its work that is done."""

    root: Path
    retries: int
    backoff: float
    log: Callable[[str], None]
    sleep: Callable[[float], None] = time.sleep
    busy: Callable[[str], AbstractContextManager[Progress]] = lambda name: nullcontext(_ignore)
    progress: Progress = _ignore

    def recorded_inputs(self, name: str) -> Values:
        """Returns the inputs of a stage that was started before; empty if it was not."""
        return dict((_read(self.root / RECORDS / f"{name}.begun") or {}).get("inputs", {}))

    def run(self, name: str, work: Work, *, settings: Values, inputs: Mapping[str, str]) -> StageResult:
        """Returns the recorded result of a stage if its record is valid, else calls `work(folder)`.

        `inputs` are digests. `work` returns its result files and metrics. It gets its folder as an interrupted run left
        it, or empty if settings or inputs have changed.
        """
        folder = self.root / name
        begun, done = (self.root / RECORDS / f"{name}.{suffix}" for suffix in ("begun", "json"))
        provenance = json.loads(json.dumps({"settings": settings, "inputs": dict(inputs)}))
        if (record := _valid_record(folder, done, provenance)) is not None:
            self.log(f"{name}: already done ({record['seconds']:.1f} s)")
            return StageResult(folder, record)
        self._prepare_folder(name, folder, begun, provenance)
        done.unlink(missing_ok=True)
        write_checksummed(begun, provenance)
        started = time.monotonic()
        with self.busy(name) as self.progress:
            files, notes = self._run_with_retries(name, folder, work)
        record = {
            **provenance,
            "outputs": {str(file.relative_to(folder)): sha256_file(file) for file in files},
            "notes": notes,
            "seconds": round(time.monotonic() - started, 3),
        }
        write_checksummed(done, record)
        shown = [f", {key} {value}" for key, value in notes.items() if isinstance(value, int | float | str)]
        self.log(f"{name}: {record['seconds']:.1f} s{''.join(shown)}")
        return StageResult(folder, record)

    def _prepare_folder(self, name: str, folder: Path, begun: Path, provenance: Values) -> None:
        """Creates the folder without results of other settings or inputs. Raises UserError for a folder that this
        pipeline did not create."""
        if not begun.exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: already exists and is not a stage folder: set another pipeline.run_root")
        before = _read(begun)
        if before != provenance:
            if before is not None:
                self.log(f"{name}: rebuilding: {', '.join(_changes(before, provenance))}")
            shutil.rmtree(folder, ignore_errors=True)
        for leftover in self.root.glob(f".{name}.*.tmp"):  # from an interrupted atomic_folder
            shutil.rmtree(leftover)
        folder.mkdir(parents=True, exist_ok=True)
        begun.parent.mkdir(parents=True, exist_ok=True)

    def _run_with_retries(self, name: str, folder: Path, work: Work) -> Output:
        attempts = self.retries + 1
        for attempt in range(1, attempts + 1):
            try:
                return work(folder)
            except (UserError, StageInterrupted):
                raise
            except Exception as error:
                if attempt == attempts:
                    raise
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self.log(f"{name}: {reason}: retrying in {self.backoff:g} s (attempt {attempt + 1} of {attempts})")
                self.sleep(self.backoff)
        raise AssertionError("unreachable")


def _valid_record(folder: Path, done: Path, provenance: Values) -> Values | None:
    """Returns the record if it matches the settings, the inputs and the result files."""
    record = _read(done)
    if record is None or {name: record.get(name) for name in provenance} != provenance:
        return None
    for name, sha256 in record["outputs"].items():
        file = folder / name
        if not file.is_file() or sha256_file(file) != sha256:
            return None
    return record


def _changes(old: Values, new: Values) -> list[str]:
    """Describes changed settings, or else changed inputs."""
    before, now = (
        {key: value for key, value in dotted_items(record.get("settings", {})) if not isinstance(value, dict)}
        for record in (old, new)
    )
    changes = [
        f"{name} changed from {json.dumps(before.get(name))} to {json.dumps(now.get(name))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    return changes[:MAX_CHANGES] or ["inputs changed"]


def _read(file: Path) -> Values | None:
    try:
        record = read_checksummed(file)
    except (OSError, ValueError):
        return None
    settings = {FORMER_SETTINGS.get(name, name): value for name, value in record.get("settings", {}).items()}
    return {**record, "settings": settings}
