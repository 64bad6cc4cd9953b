"""Atomic, durable files: after a kill, a full disk or a power cut, a file is either complete or unchanged.

Data is written to a temporary file in the same folder, fsynced, and renamed. SHA-256 digests detect later corruption.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

CHECKSUM = "content_sha256"


def fsync(descriptor: int) -> None:
    """Flushes a file or folder to the disk itself. On macOS, plain fsync leaves the data in the drive's cache."""
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError:
            pass  # file systems without F_FULLFSYNC, such as network mounts
    os.fsync(descriptor)


def fsync_dir(folder: Path) -> None:
    """Makes created, renamed and removed entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents, durably. Raises FileExistsError if it is a file."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_dir(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: temporary file, fsync, rename. Text is encoded as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(path.parent)


def write_checksummed(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON atomically; its last key is the SHA-256 of the JSON without that key."""
    write_atomic(path, with_checksum(values))


def with_checksum(values: Mapping[str, Any]) -> str:
    """Returns the text that `write_checksummed` writes."""
    plain = {name: value for name, value in values.items() if name != CHECKSUM}
    return _dump({**plain, CHECKSUM: hashlib.sha256(_dump(plain).encode()).hexdigest()})


def parse_json(text: str | bytes) -> Any:
    """Like json.loads, but raises ValueError also for JSON that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_checksummed(path: Path) -> dict[str, Any]:
    """Reads what `write_checksummed` wrote. Raises OSError if it can't be read, ValueError if any byte has changed."""
    text = path.read_bytes().decode("utf-8")  # bytes, because newlines count
    values = parse_json(text)
    if not isinstance(values, dict) or with_checksum(values) != text:
        raise ValueError("content does not match its digest")
    del values[CHECKSUM]
    return values


def _dump(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"


class HashedFile:
    """A new file that computes the SHA-256 of the bytes written to it, so that a read error can't hide corruption.

    It has no `seek`: bytes already hashed can't change.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self._sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> str:
        """Flushes the file to the disk and returns its SHA-256."""
        self._file.flush()
        fsync(self._file.fileno())
        return self._sha256.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def sha256_file(path: Path) -> str:
    """Raises OSError if the file can't be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
