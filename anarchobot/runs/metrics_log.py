"""What a run writes down: metrics.jsonl, TensorBoard's event files and, at the end, a summary.

Every line is flushed as it is written, so that a killed run keeps all but perhaps the last. A line that can't be
written (a full disk) is counted: it must not end the run.
"""

import errno
import json
import os
import struct
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Self, TextIO

from anarchobot.storage.durable import write_atomic

CURVES = ("train", "eval")  # events whose values, all of them numbers, are TensorBoard's too


class MetricsLog:
    """Appends events to `folder`/metrics.jsonl and `folder`/tensorboard, and to `echo` if there is one; a context,
    which closes both. `lost` counts the events that could not be written."""

    def __init__(self, folder: Path, echo: TextIO | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.lost, self._echo = folder, 0, echo
        path = folder / "metrics.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")  # the run before was killed as it wrote
        self._file = path.open("ab", buffering=0)
        if torn:
            self._file.write(b"\n")
        self._board = _EventFile(folder / "tensorboard")

    def event(self, event: str, step: int, **values: Any) -> None:
        """One JSON object: step, event, time (seconds since 1970) and the values."""
        line = json.dumps({"step": step, "event": event, "time": round(time.time(), 3), **values}) + "\n"
        try:
            _append(self._file, line.encode())
            self._board.add(step, {f"{event}/{name}": x for name, x in values.items() if event in CURVES})
            if event == "sample":
                self._board.add_text(step, "sample", values["text"])
        except OSError:
            self.lost += 1
        if self._echo is not None:
            with suppress(OSError):  # nobody reads this any more
                self._echo.write(line)
                self._echo.flush()

    def config(self, step: int, text: str) -> None:
        """The settings, for TensorBoard, which shows them as Markdown."""
        with suppress(OSError):
            self._board.add_text(step, "config", f"```yaml\n{text}```")

    def steps_of(self, event: str) -> set[int]:
        """The steps at which this kind of event was written down, in this run and those it goes on from."""
        steps = set()
        for text in (self.folder / "metrics.jsonl").read_bytes().splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # torn by a kill
                continue
            if line.get("event") == event:
                steps.add(line["step"])
        return steps

    def summary(self, values: dict[str, Any]) -> None:
        try:
            write_atomic(self.folder / "final_training_summary.json", json.dumps(values, indent=1) + "\n")
        except OSError:
            self.lost += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._board.close()


class NullMetricsLog(MetricsLog):
    """Of a rank beside the first, which writes for all."""

    def __init__(self) -> None: ...
    def event(self, event: str, step: int, **values: Any) -> None: ...

    def steps_of(self, event: str) -> set[int]:
        return set()

    def __exit__(self, *exc: object) -> None: ...


class _EventFile:
    """TensorBoard's file, written where we stand: its own writer has a thread, which a full disk would end silently."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import text

        self._event, self._summary, self._crc, self._text = Event, Summary, masked_crc32c, text
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"events.out.tfevents.{time.time_ns()}.anarchobot").open("xb", buffering=0)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, step: int, values: dict[str, float]) -> None:
        if values:
            points = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=points)))

    def add_text(self, step: int, tag: str, text: str) -> None:
        self._write(self._event(wall_time=time.time(), step=step, summary=self._text(tag, text)))

    def _write(self, event: Any) -> None:
        """One record: length, its checksum, content, its checksum (as TFRecord files are)."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        _append(self._file, length + self._checksum(length) + data + self._checksum(data))

    def _checksum(self, data: bytes) -> bytes:
        return struct.pack("<I", self._crc(data))

    def close(self) -> None:
        self._file.close()


def _append(file: FileIO, data: bytes) -> None:
    """All of `data` or, with an OSError, nothing: half a record would make what follows unreadable."""
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with suppress(OSError):
            file.truncate(end)
        raise
