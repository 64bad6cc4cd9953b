"""A run, a process or the machine, measured again and again: its memory, and what the run says of itself."""

import csv
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from anarchobot.config.errors import UserError
from anarchobot.runs.run_log import metrics_path, read_run
from anarchobot.storage.lock import holder, last_holder
from anarchobot.system.machine import process_memory, system_memory

FROM_THE_RUN = ("step", "tokens_per_second", "active_memory_gb", "peak_memory_gb", "cache_memory_gb")
FIRST_LOOK = 65536  # bytes of the log's end that are read when watching begins
WAITING = 0.5  # seconds between two looks for a run that has not begun


@dataclass(frozen=True)
class Sample:
    """What was so at one time (seconds since 1970); memory in 10^9 bytes. None: not known, or not asked for."""

    time: float
    process_gb: float | None
    system_used_gb: float
    system_total_gb: float
    swap_used_gb: float
    pressure: str
    step: int | None = None
    tokens_per_second: float | None = None
    active_memory_gb: float | None = None
    peak_memory_gb: float | None = None
    cache_memory_gb: float | None = None


class LogTail:
    """The newest figures of a run's metrics.jsonl; only what was appended is read. `ended`: None until the run says
    that it ends, then whether it was finished."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._at = folder, 0
        self._file: Path | None = None
        self.figures: dict[str, Any] = {}
        self.read()
        self.ended: bool | None = None  # an earlier run's end is none of this one's

    def read(self) -> None:
        if self._file is None:
            path = metrics_path(self._folder)  # reads config.yaml, hence once
            if not path.is_file():
                return
            self._file, self._at = path, max(0, path.stat().st_size - FIRST_LOOK)
        with self._file.open("rb") as file:
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole + newline)
        for text in whole.splitlines():
            try:
                line = json.loads(text)
                event = line["event"]
            except (ValueError, KeyError, TypeError):  # cut off: by a kill, or where the first look began
                continue
            if event == "train":
                self.figures = {name: line.get(name) for name in FROM_THE_RUN}
            self.ended = bool(line.get("finished")) if event == "end" else None


class Watched:
    """What is looked at: a run (by its folder), a process (by its number), or the machine alone."""

    def __init__(self, pid: int | None = None, folder: Path | None = None) -> None:
        """Raises UserError when there is no such process."""
        self.pid, self._folder = pid, folder
        self._tail = LogTail(folder) if folder is not None else None
        if pid is not None and process_memory(pid) is None:
            raise UserError(f"--pid {pid}: no such process: expected the number of one that runs here")

    def sample(self) -> Sample | None:
        """None when the process has ended."""
        memory = process_memory(self.pid) if self.pid is not None else None
        if self._tail is not None:
            self._tail.read()
        if self.pid is not None and memory is None:
            return None
        system = system_memory()
        return Sample(
            round(time.time(), 3), None if memory is None else _gb(memory), _gb(system.used), _gb(system.total),
            _gb(system.swap_used), system.pressure, **(self._tail.figures if self._tail is not None else {}),
        )  # fmt: skip

    def samples(self, interval: float, duration: float | None) -> Iterator[Sample]:
        """One every `interval` seconds, until the process ends or `duration` is over; an interval that was missed is
        left out."""
        began = time.monotonic()
        while duration is None or time.monotonic() - began <= duration:
            sample = self.sample()
            if sample is None:
                return
            yield sample
            time.sleep(interval - (time.monotonic() - began) % interval)

    @property
    def end(self) -> str:
        """What became of it: "running", or how it ended: "finished" and "stopped" as a run says it, "died" when it said
        nothing, "ended" of a process that is no run."""
        if self.pid is None or process_memory(self.pid) is not None:
            return "running"
        if self._tail is None:
            return "ended"
        self._tail.read()  # its last words may have come since
        return "died" if self._tail.ended is None else "finished" if self._tail.ended else "stopped"


def find_run(folder: Path, *, wait: bool, seconds: float | None = None) -> Watched | None:
    """The run that writes to `folder` now, or, with `wait`, the next one that does. Raises UserError when there is
    none, or it runs on another machine; None when there is none within `seconds`."""
    until = None if seconds is None else time.monotonic() + seconds
    while (pid := _pid_of_run(folder)) is None:
        if not wait:
            run = read_run(folder)  # tells that there is none at all
            raise UserError(
                f"{folder}: no run is going on here (this one {run.state} at step {run.step}): give --wait to wait for "
                "the next"
            )
        if until is not None and time.monotonic() >= until:
            return None
        time.sleep(WAITING)
    return Watched(pid, folder)


def _pid_of_run(folder: Path) -> int | None:
    named = re.fullmatch(r"process (\d+) on (\S+)", last_holder(folder) or "")
    if named is None:
        return None
    pid, here = int(named[1]), named[2] == socket.gethostname()
    if (here and process_memory(pid) is None) or holder(folder) is None:
        return None
    if not here:
        raise UserError(f"{folder}: its run is {named[0]}: watch it there")
    return pid


class Alarm:
    """Tells of each time that memory comes above a limit: `"12"` GB of the process (of the machine, where none is
    watched), or `"90%"` of the machine's."""

    def __init__(self, limit: str) -> None:
        """Raises UserError for what is no limit."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", limit)
        if found is None or not 0 < float(found[1]) <= (100 if found[2] else 1e6):
            raise UserError(
                f"--alarm {limit}: expected GB, such as 12, or a share of the machine's memory, such as 90%"
            )
        self._limit, self._share, self._above = float(found[1]), bool(found[2]), False

    def crossed(self, sample: Sample) -> str | None:
        """A line, when it is above and was not the time before."""
        was = self._above
        if self._share:
            value, what, unit = 100 * sample.system_used_gb / sample.system_total_gb, "the machine uses", "%"
        elif sample.process_gb is not None:
            value, what, unit = sample.process_gb, "the process uses", " GB"
        else:
            value, what, unit = sample.system_used_gb, "the machine uses", " GB"
        self._above = value > self._limit
        if was or not self._above:
            return None
        at = time.strftime("%H:%M:%S", time.localtime(sample.time))
        return f"{at} alarm: {what} {value:.4g}{unit}, above {self._limit:g}{unit}"


class Csv:
    """Appends a row for each sample, flushed; a file that is there is gone on with."""

    def __init__(self, path: Path) -> None:
        self._names = [field.name for field in fields(Sample)]
        self._file: TextIO = path.open("a", encoding="utf-8", newline="")
        self._rows = csv.writer(self._file)
        if self._file.tell() == 0:
            self._rows.writerow(self._names)

    def add(self, sample: Sample) -> None:
        self._rows.writerow([getattr(sample, name) for name in self._names])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _gb(size: int) -> float:
    return round(size / 1e9, 4)
