"""Stages of a long task, each in a folder of its own: skipped while its record holds, tried again, gone on with.

ROOT/NAME/                 what the stage makes
ROOT/records/NAME.begun    settings and inputs' digests of what is, or was, being made
ROOT/records/NAME.json     the same, with the digests of what was made, results in numbers and seconds
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.storage.durable import read_sealed, sha256_file, write_sealed

RECORDS = "records"
Values = dict[str, Any]


class Stopped(Exception):
    """A stage was stopped by a person, and can be gone on with."""


@dataclass(frozen=True)
class Done:
    """A stage's folder, and what its record says: `notes` are its results in numbers, `outputs` its files' digests."""

    folder: Path
    record: Values

    @property
    def notes(self) -> Values:
        return dict(self.record["notes"])

    @property
    def digest(self) -> str:
        """Tells the stage's results from any other."""
        return hashlib.sha256(json.dumps(self.record["outputs"], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Stages:
    """`retries`: how often a stage that failed is tried again, after `backoff` seconds; a UserError is nobody's bad
    luck and is not. `say` gets lines for a person."""

    root: Path
    retries: int
    backoff: float
    say: Callable[[str], None]
    sleep: Callable[[float], None] = time.sleep

    def begun_with(self, name: str) -> Values:
        """The inputs of a stage that was begun, and perhaps done; none where it wasn't."""
        return dict((_read(self.root / RECORDS / f"{name}.begun") or {}).get("inputs", {}))

    def run(
        self,
        name: str,
        work: Callable[[Path], tuple[Sequence[Path], Values]],
        *,
        settings: Values,
        inputs: Mapping[str, str],
    ) -> Done:
        """`work(folder)` returns its files and its notes. It finds its folder as a stopped try left it, or new where
        settings or inputs have changed; when its record still holds, it isn't called."""
        folder = self.root / name
        begun, done = (self.root / RECORDS / f"{name}.{kind}" for kind in ("begun", "json"))
        key = json.loads(json.dumps({"settings": settings, "inputs": dict(inputs)}))
        if (found := _recorded(folder, done, key)) is not None:
            self.say(f"{name}: done before ({found['seconds']:.1f} s)")
            return Done(folder, found)
        self._make_room(name, folder, begun, key)
        for needed in (folder, begun.parent):
            needed.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        write_sealed(begun, key)
        started = time.monotonic()
        files, notes = self._tried(name, folder, work)
        record = {
            **key,
            "outputs": {str(file.relative_to(folder)): sha256_file(file) for file in files},
            "notes": notes,
            "seconds": round(time.monotonic() - started, 3),
        }
        write_sealed(done, record)
        self.say(f"{name}: {record['seconds']:.1f} s" + "".join(f", {k} {v}" for k, v in notes.items() if _short(v)))
        return Done(folder, record)

    def _make_room(self, name: str, folder: Path, begun: Path, key: Values) -> None:
        """Removes what a try with other settings or inputs has left. Raises UserError for a folder of another's."""
        if not begun.exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is there, and no stage has made it: choose another folder for the stages")
        before = _read(begun)
        if before is not None and before != key:
            self.say(f"{name}: anew, for {' and '.join(_changes(before, key))}")
        if before != key:
            shutil.rmtree(folder, ignore_errors=True)
        for left in self.root.glob(f".{name}.*.tmp"):  # of a folder that is made beside its name
            shutil.rmtree(left)

    def _tried(
        self, name: str, folder: Path, work: Callable[[Path], tuple[Sequence[Path], Values]]
    ) -> tuple[Sequence[Path], Values]:
        for again in range(self.retries + 1):
            try:
                return work(folder)
            except (UserError, Stopped):
                raise
            except Exception as error:
                if again == self.retries:
                    raise
                told = " ".join(f"{type(error).__name__}: {error}".split())
                self.say(f"{name}: {told}: again in {self.backoff:g} s (try {again + 2} of {self.retries + 1})")
                self.sleep(self.backoff)
        raise AssertionError("unreachable")


def _recorded(folder: Path, done: Path, key: Values) -> Values | None:
    """The record, if it is of these settings and inputs and the files are as it says."""
    record = _read(done)
    if record is None or {name: record.get(name) for name in key} != key:
        return None
    for name, sha256 in record["outputs"].items():
        file = folder / name
        if not file.is_file() or sha256_file(file) != sha256:
            return None
    return record


def _changes(old: Values, new: Values) -> list[str]:
    """What has changed, in words: settings by name, with what they were and are."""
    before, now = (_flat(key.get("settings", {})) for key in (old, new))
    told = [
        f"{name} was {json.dumps(before.get(name))}, is now {json.dumps(now.get(name))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    return told[:3] or ["what it is made from has changed"]


def _flat(settings: Values) -> Values:
    flat: Values = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": v for key, v in _flat(value).items()} if isinstance(value, dict) else {name: value}
    return flat


def _read(file: Path) -> Values | None:
    try:
        return read_sealed(file)
    except (OSError, ValueError):
        return None


def _short(value: object) -> bool:
    return isinstance(value, int | float | str)
