"""Samples the memory of a run, a process or the machine, along with the metrics that the run logs."""

import csv
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from anarchobot.config.errors import UserError
from anarchobot.runs.metrics_log import Event, parse_events
from anarchobot.runs.run_log import metrics_path, read_run
from anarchobot.storage.lock import holder, last_holder
from anarchobot.system.machine import process_memory, system_memory

LOGGED = ("step", "tokens_per_second", "active_memory_gb", "peak_memory_gb", "cache_memory_gb")
TAIL_BYTES = 65536  # of the log, read at the start
POLL_SECONDS = 0.5  # while waiting for a run
END_SECONDS = 10.0  # without an event after the end of a run, while its process does something else


@dataclass(frozen=True)
class Sample:
    """`time` is in seconds since 1970, memory in 10^9 bytes. None: unknown or not requested."""

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
    """Follows a run's metrics.jsonl, reading only appended lines. `metrics` are from the last training step.
    `finished` is None until the run logs its end."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._offset = folder, 0
        self._file: Path | None = None
        self.metrics: dict[str, Any] = {}
        self.last_event = time.monotonic()
        self.read()
        self.finished: bool | None = None  # an end logged so far is from an earlier run

    def read(self) -> list[Event]:
        """Returns the events that were appended."""
        if self._file is None:
            path = metrics_path(self._folder)  # only once: it reads config.yaml
            if not path.is_file():
                return []
            self._file, self._offset = path, max(0, path.stat().st_size - TAIL_BYTES)
        with self._file.open("rb") as file:
            file.seek(self._offset)
            lines, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(lines + newline)
        events = parse_events(lines)[0]
        if events:
            self.last_event = time.monotonic()
        for event in events:
            if event["event"] == "train":
                self.metrics = {name: event.get(name) for name in LOGGED}
            self.finished = bool(event.get("finished")) if event["event"] == "end" else None
        return events


class Monitor:
    """Samples a run (process and folder), a process, or with neither the machine alone."""

    def __init__(self, pid: int | None = None, folder: Path | None = None) -> None:
        """Raises UserError if there is no such process."""
        self.pid = pid
        self._log = LogTail(folder) if folder is not None else None
        if pid is not None and process_memory(pid) is None:
            raise UserError(f"--pid {pid}: no such process")

    def sample(self) -> Sample | None:
        """Returns None if the process has ended, or the run has and the process goes on, as `train` does."""
        memory = process_memory(self.pid) if self.pid is not None else None
        if self._log is not None:
            self._log.read()
        if self.pid is not None and (memory is None or self._has_ended):
            return None
        system = system_memory()
        return Sample(
            round(time.time(), 3), None if memory is None else _gb(memory), _gb(system.used), _gb(system.total),
            _gb(system.swap_used), system.pressure, **(self._log.metrics if self._log is not None else {}),
        )  # fmt: skip

    def samples(self, interval: float, duration: float | None) -> Iterator[Sample]:
        """Yields a sample every `interval` seconds until the process ends or `duration` is over. Missed samples are
        skipped."""
        start = time.monotonic()
        while duration is None or time.monotonic() - start <= duration:
            sample = self.sample()
            if sample is None:
                return
            yield sample
            time.sleep(interval - (time.monotonic() - start) % interval)

    @property
    def _has_ended(self) -> bool:
        """`train` ends its run and resumes it with another length, but within seconds."""
        log = self._log
        return log is not None and log.finished is not None and time.monotonic() - log.last_event > END_SECONDS

    @property
    def state(self) -> str:
        """One of "running"; "finished", "stopped" or "died" (no end was logged) for a run; "ended" for a process."""
        if self.pid is None or (process_memory(self.pid) is not None and not self._has_ended):
            return "running"
        if self._log is None:
            return "ended"
        self._log.read()  # it may have logged its end after the last sample
        return "died" if self._log.finished is None else "finished" if self._log.finished else "stopped"


def attach(folder: Path, *, wait: bool, timeout: float | None = None) -> Monitor | None:
    """Attaches to the run that writes to `folder`; with `wait`, to the next one that does. Returns None after `timeout`
    seconds. Raises UserError if there is no run, or if it is on another machine."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while (pid := running_pid(folder)) is None:
        if not wait:
            run = read_run(folder)  # raises UserError if the folder holds no run
            raise UserError(f"{folder}: not running ({run.state} at step {run.step}): --wait waits for the next run")
        if deadline is not None and time.monotonic() >= deadline:
            return None
        time.sleep(POLL_SECONDS)
    return Monitor(pid, folder)


def running_pid(folder: Path) -> int | None:
    match = re.fullmatch(r"process (\d+) on (\S+)", last_holder(folder) or "")
    if match is None:
        return None
    pid, local = int(match[1]), match[2] == socket.gethostname()
    if (local and process_memory(pid) is None) or holder(folder) is None:
        return None
    if not local:
        raise UserError(f"{folder}: the run is {match[0]}: monitor it there")
    return pid


class Alarm:
    """Reports when memory rises above a limit: `"12"` GB of the process (of the machine, without a process), or `"90%"`
    of the machine's memory."""

    def __init__(self, limit: str) -> None:
        """Raises UserError if `limit` is invalid."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", limit)
        if match is None or not 0 < float(match[1]) <= (100 if match[2] else 1e6):
            raise UserError(
                f"--alarm {limit}: expected GB, such as 12, or a share of the machine's memory, such as 90%"
            )
        self._limit, self._percent, self._above = float(match[1]), bool(match[2]), False

    def message(self, sample: Sample) -> str | None:
        """Returns a message if memory is above the limit now and was not in the previous sample."""
        was_above = self._above
        if self._percent:
            value, subject, unit = 100 * sample.system_used_gb / sample.system_total_gb, "the machine uses", "%"
        elif sample.process_gb is not None:
            value, subject, unit = sample.process_gb, "the process uses", " GB"
        else:
            value, subject, unit = sample.system_used_gb, "the machine uses", " GB"
        self._above = value > self._limit
        if was_above or not self._above:
            return None
        at = time.strftime("%H:%M:%S", time.localtime(sample.time))
        return f"{at} alarm: {subject} {value:.4g}{unit}, above {self._limit:g}{unit}"


class CsvWriter:
    """Appends samples to a CSV file, flushing every row. The header is written only to an empty file."""

    def __init__(self, path: Path) -> None:
        self._columns = [field.name for field in fields(Sample)]
        self._file: TextIO = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        if self._file.tell() == 0:
            self._writer.writerow(self._columns)

    def add(self, sample: Sample) -> None:
        self._writer.writerow([getattr(sample, name) for name in self._columns])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _gb(size: int) -> float:
    return round(size / 1e9, 4)
