"""Files that are whole or not there, also when the program is killed, the disk is full or the power goes.

All that must survive is written beside its name, flushed to the disk, and renamed; digests tell damage later.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

SEAL = "content_sha256"


def flush(descriptor: int) -> None:
    """Returns when the file or folder is on the disk itself. On macOS fsync leaves it in the drive's cache."""
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError:
            pass  # a file system that knows no F_FULLFSYNC, such as a network's
    os.fsync(descriptor)


def fsync_dir(folder: Path) -> None:
    """Brings a folder's entries (names made, renamed, removed) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Writes beside, flushes, renames: the file is whole or what it was before."""
    beside = path.with_name(f"{path.name}.tmp")
    with beside.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        flush(file.fileno())
    beside.replace(path)
    fsync_dir(path.parent)


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON whole, with a digest of its own content at its end."""
    write_atomic(path, sealed(values))


def sealed(values: Mapping[str, Any]) -> str:
    """The text that `write_sealed` writes."""
    plain = {name: value for name, value in values.items() if name != SEAL}
    return _dump({**plain, SEAL: hashlib.sha256(_dump(plain).encode()).hexdigest()})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises OSError when it can't be read, ValueError when a byte of it is another."""
    text = path.read_bytes().decode("utf-8")  # as it is: newlines count
    values = json.loads(text)
    if not isinstance(values, dict) or sealed(values) != text:
        raise ValueError("its content is not what was written")
    del values[SEAL]
    return values


def _dump(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"


class HashedFile:
    """A new file whose digest is taken of what is written, not of what the disk gives back. It can't go back (has no
    `seek`), so that nothing already hashed is changed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self._sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> str:
        """Brings the file to the disk; returns its sha256."""
        self._file.flush()
        flush(self._file.fileno())
        return self._sha256.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def sha256_file(path: Path) -> str:
    """Raises OSError when the file can't be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
