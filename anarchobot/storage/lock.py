"""One writer to a folder: a lock that the system itself takes back when its holder dies, even by kill -9."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import Self

NAME = ".lock"


def last_holder(folder: Path) -> str | None:
    """Who wrote to `folder` last, and perhaps still does; the lock itself is left alone."""
    try:
        return (folder / NAME).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def holder(folder: Path) -> str | None:
    """Who writes to `folder` now, such as `process 12 on mac`; None when nobody does, as far as the file system tells.

    A program that begins in the instant in which this looks is refused: what looks again and again asks `last_holder`
    first, and whether that process lives.
    """
    try:
        with (folder / NAME).open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:
        pass  # no lock, or a file system without
    return None


class FolderLock:
    """A context in which this process alone may write to `folder`, which is made when it is not there.

    Raises BlockingIOError, for people to read, when another process holds it. The file stays: who removed it could lock
    another one than the next.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            told = "a file is in the way: choose another folder, or move it"
            raise NotADirectoryError(errno.ENOTDIR, told, str(self._path.parent)) from error
        self._file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            told = f"{holder} is writing here: wait for its end, or choose another folder"
            raise BlockingIOError(errno.EWOULDBLOCK, told, str(self._path.parent)) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks: go on without
                raise
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
